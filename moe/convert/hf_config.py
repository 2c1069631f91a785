"""Reads a published config.json as our ModelConfig and RouterConfig.

Four model types: phi3 (mini, 3.5-mini, medium), phimoe (Phi-3.5-MoE, SlimMoE), grinmoe and
phi3small, in the spelling of transformers 4 or 5. A missing key means what the classes of
transformers mean by it (Phi3Config, PhimoeConfig), and phi-3-small's own configuration class.

Nothing that changes what is computed is passed over in silence: what this code cannot do (dropout
inside attention, quantised weights, another activation) is refused with the key's name.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.config import RouterConfig
from moe.convert.hf_config_write import WINDOW_NAMES, family_of, to_hf_config
from moe.convert.hf_families import read_phi3, read_phi3small, read_phimoe, read_router
from moe.convert.json_fields import Fields, read_json_object, shown
from moe.errors import ConfigError, nearest
from moe.model_config import ModelConfig

__all__ = [
    "HfModel",
    "config_describes",
    "family_of",
    "load_hf_config",
    "read_hf_config",
    "to_hf_config",
]

DTYPE_NAMES = ("bfloat16", "float16", "float32")
# model_type -> family
FAMILIES = {"phi3": "phi3", "phimoe": "phimoe", "grinmoe": "phimoe", "phi3small": "phi3small"}
# more would be 40 TB in float32: a slip, not a model
_MOST_PARAMETERS = 10**13


@dataclass(frozen=True)
class HfModel:
    """What a config.json says; family is "phi3", "phimoe" (GRIN-MoE too) or "phi3small"."""

    model: ModelConfig
    router: RouterConfig  # of a dense model: the default, without a meaning
    family: str
    dtype: str | None = None  # of the weights, where the file says so


def load_hf_config(path: str | Path, *, window: str = "original") -> HfModel:
    """Read a config.json, or the one in a folder; ConfigError for whatever is wrong with it."""
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: {error}. Give the whole path.") from None
    file = path / "config.json" if path.is_dir() else path
    return read_hf_config(read_json_object(file), where=str(file), window=window)


def read_hf_config(values: dict[str, Any], *, where: str, window: str = "original") -> HfModel:
    """Return the model that a config.json's values describe.

    window: who counts the sliding window. "original": the released code, in which config.json's
    number is FlashAttention's left window, so a query sees one key more. "transformers": 4.57 and
    later, which show exactly that many keys. (Up to 4.46 transformers did as the original.)

    ConfigError names the file (where), the key, its value and what is allowed.
    """
    if window not in WINDOW_NAMES:
        raise ConfigError(f"window: got {window!r}; allowed: {', '.join(WINDOW_NAMES)}.")
    fields = Fields(values, where)
    for key in values:
        if key != key.strip():
            raise ConfigError(
                f"{where}: {shown(key)}: has white space at an end, so no reader finds the key; "
                f"allowed: {shown(key.strip())}. Correct it in the file, or remove it."
            )
    kind = _model_type(fields)
    family = FAMILIES[kind]
    if fields.is_given("quantization_config"):
        raise fields.mistake(
            "quantization_config",
            "null; quantised weights are not read",
            fix="Take the published model in bfloat16.",
        )
    read = {"phi3": read_phi3, "phimoe": read_phimoe, "phi3small": read_phi3small}[family]
    try:
        model = read(fields, window)
        router = read_router(fields) if family == "phimoe" else RouterConfig()
    except ConfigError as error:
        if str(error).startswith(f"{where}:"):
            raise
        raise ConfigError(f"{where}: read as our configuration, {error}") from None
    if model.num_parameters() > _MOST_PARAMETERS:
        raise ConfigError(
            f"{where}: hidden_size, num_hidden_layers, intermediate_size: got a model of "
            f"{model.num_parameters():.1e} parameters; allowed: at most {_MOST_PARAMETERS:.0e}, "
            "which is 40 TB in float32. Correct the sizes in the file."
        )
    name = "grin_moe" if kind == "grinmoe" else {"phi3small": "phi3_small"}.get(kind, kind)
    model = dataclasses.replace(model, name=name)
    return HfModel(model=model, router=router, family=family, dtype=_dtype(fields))


def config_describes(
    values: dict[str, Any],
    model: ModelConfig,
    router: RouterConfig,
    *,
    where: str,
    window: str = "original",
) -> bool:
    """Whether config.json's values still say what the model is, so that they may be given back.

    The model's name has no place in a config.json, and neither has how a run balances its load;
    both are left out of the comparison.
    """
    read = read_hf_config(values, where=where, window=window)
    if dataclasses.replace(read.model, name=model.name) != model:
        return False
    if not model.is_sparse:
        return True
    said = ("name", "mask_threshold", "input_jitter", "balance_coef", "renormalise")
    return all(getattr(read.router, key) == getattr(router, key) for key in said)


def _model_type(fields: Fields) -> str:
    kind = fields.values.get("model_type")
    if kind == "phi3_v":
        raise ConfigError(
            f"{fields.where}: model_type: got 'phi3_v', Phi-3 with vision, whose image encoder "
            f"is not built here; allowed: {', '.join(FAMILIES)}. Give a model of text alone."
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        near = nearest(kind, FAMILIES) if isinstance(kind, str) else ""
        got = shown(kind) if "model_type" in fields.values else "nothing, the key is missing"
        raise ConfigError(
            f"{fields.where}: model_type: got {got}; allowed: {', '.join(FAMILIES)}.{near} "
            "Give the config.json of a model of the Phi-3 family."
        )
    return kind


def _dtype(fields: Fields) -> str | None:
    for key in ("dtype", "torch_dtype"):
        if fields.is_given(key):
            name = fields.text(key, "").removeprefix("torch.")
            if name not in DTYPE_NAMES:
                raise fields.mistake(key, ", ".join(DTYPE_NAMES))
            return name
    return None
