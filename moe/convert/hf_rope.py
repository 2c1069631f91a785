"""Rotary positions in a published config.json, read in every spelling and written in the oldest.

Spellings: rope_scaling beside rope_theta (transformers 4) or rope_parameters that holds both
(transformers 5); the type under `type` or `rope_type`; LongRoPE called su, yarn or longrope.
transformers renames su and yarn to longrope and gives all three LongRoPE's scale (the first
uploads' own code had 0.1 ln(s) + 1 for yarn); so do we.
"""

from __future__ import annotations

import math
from typing import Any

from moe.convert.json_fields import Fields, shown
from moe.errors import ConfigError
from moe.model_config import ModelConfig, RopeConfig

LONGROPE_NAMES = ("longrope", "su", "yarn")
# the base where config.json does not give one: the classes of transformers, and phi-3-small's own
_THETA_KEY = {"phi3": "rope_theta", "phimoe": "rope_theta", "phi3small": "rope_embedding_base"}
_THETA = {"phi3": 1e4, "phimoe": 1e6, "phi3small": 1e6}
_ORIGINAL_LENGTH = {"phi3": 4096, "phi3small": 8192}


def longrope_scale(ratio: float, original_length: int) -> float:
    """LongRoPE's factor of cos and sin for a text `ratio` times as long as the original length:
    sqrt(1 + ln ratio / ln original_length), and 1 where nothing is lengthened."""
    if ratio <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(ratio) / math.log(original_length))


def read_rope(fields: Fields, *, family: str, head_dim: int, max_position: int) -> RopeConfig:
    """Return the rotary positions of a config.json; ConfigError names what is wrong.

    Without LongRoPE the original length is max_position, the whole of what the model takes.
    """
    scaling = _scaling(fields, theta_key=_THETA_KEY[family])
    nested = [key for key, value in scaling.values.items() if isinstance(value, dict)]
    if nested:
        raise scaling.mistake(nested[0], "one set of rotary positions for all layers, no objects")
    theta_key = _THETA_KEY[family]
    theta = (scaling if scaling.is_given(theta_key) else fields).number(theta_key, _THETA[family])
    fraction = _rotary_fraction(fields, scaling, family)
    kind = _kind(scaling)
    if kind == "default":
        for key in ("short_factor", "long_factor"):
            if scaling.is_given(key):
                raise scaling.mistake(
                    key,
                    f"null, as the type is {kind!r}",
                    fix="Set the type to 'longrope', or remove the factors.",
                )
        return RopeConfig(theta=theta, original_max_position=max_position, rotary_fraction=fraction)
    original = _original_length(fields, scaling, family, max_position)
    num_pairs = int(head_dim * fraction) // 2
    why = f"half of the {int(head_dim * fraction)} rotated numbers of a head"
    short_mscale, long_mscale = _mscales(scaling, family, max_position, original)
    return RopeConfig(
        theta=theta,
        original_max_position=original,
        short_factor=scaling.numbers("short_factor", length=num_pairs, why=why),
        long_factor=scaling.numbers("long_factor", length=num_pairs, why=why),
        short_mscale=short_mscale,
        long_mscale=long_mscale,
        rotary_fraction=fraction,
    )


def _scaling(fields: Fields, *, theta_key: str) -> Fields:
    """rope_scaling, rope_parameters, or both where they say the same, and the same base as the
    top level."""
    older, newer = fields.group("rope_scaling"), fields.group("rope_parameters")
    scaling = older or newer or Fields({}, f"{fields.where}: rope_scaling")
    if older and newer:
        for key in newer.values:
            if older.is_given(key) and older.values[key] != newer.values[key]:
                raise newer.mistake(key, f"{shown(older.values[key])}, as in rope_scaling")
        scaling = Fields({**newer.values, **older.values}, newer.where)
    if newer and newer.is_given(theta_key) and fields.is_given(theta_key):
        base = fields.values[theta_key]
        if newer.values[theta_key] != base:
            raise newer.mistake(theta_key, f"{shown(base)}, as at the top level")
    return scaling


def _kind(scaling: Fields) -> str:
    """ "default" or "longrope"."""
    for key in ("rope_type", "type"):
        if scaling.is_given(key):
            kind = scaling.text(key, "")
            if kind in LONGROPE_NAMES:
                return "longrope"
            if kind != "default":
                raise scaling.mistake(key, f"default, {', '.join(LONGROPE_NAMES)}")
            return "default"
    return "default"


def _rotary_fraction(fields: Fields, scaling: Fields, family: str) -> float:
    key = "partial_rotary_factor"
    holder = scaling if scaling.is_given(key) else fields
    if not holder.is_given(key):
        return 1.0
    fraction = holder.number(key, 1.0)
    if fraction > 1.0 or (fraction < 1.0 and family != "phi3"):
        allowed = "above 0 and at most 1" if family == "phi3" else f"1.0, {family} rotates all"
        raise holder.mistake(key, allowed)
    return fraction


def _original_length(fields: Fields, scaling: Fields, family: str, max_position: int) -> int:
    """The length of the short regime; the top level is asked first, as transformers does."""
    key = "original_max_position_embeddings"
    default = _ORIGINAL_LENGTH.get(family, max_position)
    # at least 2: LongRoPE's scale divides by its logarithm
    return (fields if fields.is_given(key) else scaling).whole(key, default, least=2)


def _mscales(scaling: Fields, family: str, max_position: int, original: int) -> tuple[float, float]:
    """What multiplies cos and sin up to the original length, and beyond it."""
    if family == "phimoe":  # the checkpoint's own numbers, not to be computed from lengths
        for key in ("short_mscale", "long_mscale"):
            if not scaling.is_given(key):
                raise scaling.mistake(
                    key,
                    "a number above 0",
                    fix="It belongs to the checkpoint: take it from the model's own config.json "
                    "(Phi-3.5-MoE has 1.243163121016122).",
                )
        return scaling.number("short_mscale", 1.0), scaling.number("long_mscale", 1.0)
    if family == "phi3small":  # modeling_phi3_small.py: 0, negative or missing means its default
        given = [
            scaling.number(key, 0.0, least=-math.inf) if scaling.is_given(key) else 0.0
            for key in ("short_mscale", "long_mscale")
        ]
        computed = (1.0, longrope_scale(max_position / original, original))
        short, long = (g if g > 0 else c for g, c in zip(given, computed, strict=True))
        return short, long
    if scaling.is_given("attention_factor"):
        scale = scaling.number("attention_factor", 1.0)
    else:
        ratio = max_position / original
        if scaling.is_given("factor"):
            ratio = scaling.number("factor", 1.0)
        scale = longrope_scale(ratio, original)
    return scale, scale  # in both regimes


def rope_values(model: ModelConfig, *, family: str) -> dict[str, Any]:
    """Return the keys of config.json that give the model's rotary positions, as transformers 4
    spells them; transformers 5 reads them too.

    rope_scaling holds exactly the keys that the published files have, for transformers 4 counts
    them. A model whose factors are not known is written up to its usable length, where it needs
    none: the same function, under another description. ConfigError where the family cannot hold it.
    """
    rope, length = model.rope, model.usable_length
    values: dict[str, Any] = {_THETA_KEY[family]: rope.theta, "max_position_embeddings": length}
    if rope.rotary_fraction != 1.0:
        if family != "phi3":
            raise _unheld("rotary_fraction", rope.rotary_fraction, family, "1.0")
        values["partial_rotary_factor"] = rope.rotary_fraction
    short, long, long_mscale = rope.short_factor, rope.long_factor, rope.long_mscale
    original = rope.original_max_position
    if short is None or long is None:
        if rope.short_mscale == 1.0:
            plain = {"original_max_position_embeddings": length, "rope_scaling": None}
            return values | ({"rope_scaling": None} if family == "phi3small" else plain)
        # plain frequencies with a scale: no type but longrope has one
        short = long = (1.0,) * (model.rotary_dim // 2)
        original, long_mscale = length, rope.short_mscale
    if original < 2:
        raise _unheld("original_max_position", original, family, "2 or more")
    scaling: dict[str, Any] = {
        "type": "longrope",
        "short_factor": list(short),
        "long_factor": list(long),
    }
    if family == "phi3":
        if rope.short_mscale != long_mscale:
            raise _unheld(
                "long_mscale", long_mscale, family, f"that of short_mscale, {rope.short_mscale}"
            )
        if rope.short_mscale != longrope_scale(length / original, original):
            # read by transformers 5 only; 4 refuses a fourth key rather than computing otherwise
            scaling["attention_factor"] = rope.short_mscale
    else:
        scaling |= {"short_mscale": rope.short_mscale, "long_mscale": long_mscale}
        scaling["original_max_position_embeddings"] = original
    return values | {"original_max_position_embeddings": original, "rope_scaling": scaling}


def _unheld(key: str, value: object, family: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"model.rope.{key}: got {value}; a config.json of {family} can only say {allowed}. "
        "Such a model has no published format; keep it as a run folder."
    )
