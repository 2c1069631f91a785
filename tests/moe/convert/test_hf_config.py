"""config.json of the family: every published spelling, back again, and 300 broken files.

published/ holds the published files, key for key; lists of factors that are not published outside
the checkpoint (64 numbers: Phi-3.5-MoE, medium-128k, small-128k) are invented there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe.config import RouterConfig
from moe.convert.hf_config import (
    HfModel,
    config_describes,
    family_of,
    load_hf_config,
    read_hf_config,
    to_hf_config,
)
from moe.convert.hf_families import SMALL_MASKED_TOKENS
from moe.errors import ConfigError
from moe.model_config import BlockSparseConfig, ModelConfig, RopeConfig

PUBLISHED = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "published").glob("*.json"))
}
MINI_SCALE = 1.1902380714238083


def read(values: dict[str, Any], **options: str) -> HfModel:
    return read_hf_config(values, where="config.json", **options)


def changed(name: str, **values: Any) -> dict[str, Any]:
    return copy.deepcopy(PUBLISHED[name]) | values


def as_transformers_5(values: dict[str, Any]) -> dict[str, Any]:
    """The same file as transformers 5 saves it: dtype, and rope_parameters that hold all."""
    values = copy.deepcopy(values)
    rope = values.pop("rope_scaling", None) or {"type": "default"}
    rope = {"rope_type" if key == "type" else key: value for key, value in rope.items()}
    rope["rope_theta"] = values.pop("rope_theta")
    rope["partial_rotary_factor"] = 1.0
    if rope["rope_type"] == "su":
        rope["rope_type"] = "longrope"
    return values | {"rope_parameters": rope, "dtype": values.pop("torch_dtype")}


@pytest.mark.parametrize(
    ("name", "family", "total", "active"),
    [
        ("phi3_mini_4k", "phi3", 3_821_079_552, 3_821_079_552),
        ("phi3_mini_128k_april", "phi3", 3_821_079_552, 3_821_079_552),
        ("phi35_mini", "phi3", 3_821_079_552, 3_821_079_552),
        ("phi3_medium_4k", "phi3", 13_960_238_080, 13_960_238_080),
        ("phi3_medium_128k", "phi3", 13_960_238_080, 13_960_238_080),
        ("phi3_small_8k", "phi3small", 7_392_272_384, 7_392_272_384),
        ("phi3_small_128k", "phi3small", 7_392_272_384, 7_392_272_384),
        ("phi35_moe", "phimoe", 41_873_153_344, 6_640_999_744),
        ("grin_moe", "phimoe", 41_873_153_344, 6_640_999_744),
    ],
)
def test_a_published_file_gives_the_published_size(
    name: str, family: str, total: int, active: int
) -> None:
    found = read(PUBLISHED[name])
    assert (found.family, family_of(found.model), found.dtype) == (family, family, "bfloat16")
    assert found.model.num_parameters() == total
    assert found.model.num_parameters(active=True) == active


def test_all_published_files_are_tested() -> None:
    assert len(PUBLISHED) == 9


@pytest.mark.parametrize("name", [n for n in PUBLISHED if "small" not in n])
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert read(as_transformers_5(PUBLISHED[name])) == read(PUBLISHED[name])


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_longrope_has_three_names_and_one_scale_in_both_regimes(kind: str, key: str) -> None:
    values = changed("phi35_mini")
    del values["rope_scaling"]["type"]
    values["rope_scaling"][key] = kind
    rope = read(values).model.rope
    assert (rope.short_mscale, rope.long_mscale) == (MINI_SCALE, MINI_SCALE)
    assert rope.long_factor is not None
    assert (len(rope.long_factor), rope.long_factor[47], rope.short_factor[0]) == (48, 64.84, 1.0)  # type: ignore[index]
    assert (rope.original_max_position, read(values).model.usable_length) == (4096, 131_072)


def test_the_original_length_may_stand_inside_the_group_alone() -> None:
    values = changed("phi35_mini")
    del values["original_max_position_embeddings"]
    values["rope_scaling"]["original_max_position_embeddings"] = 2048
    rope = read(values).model.rope
    assert rope.original_max_position == 2048
    assert rope.long_mscale == math.sqrt(1 + math.log(64) / math.log(2048))
    # where both stand, transformers asks the top level
    assert read(values | {"original_max_position_embeddings": 4096}).model.rope.long_mscale == (
        MINI_SCALE
    )


def test_a_factor_and_an_attention_factor_are_followed() -> None:
    values = changed("phi35_mini")
    values["rope_scaling"]["factor"] = 4
    expected = math.sqrt(1 + math.log(4) / math.log(4096))
    assert read(values).model.rope.short_mscale == expected
    values["rope_scaling"]["attention_factor"] = 1.5
    assert read(values).model.rope.long_mscale == 1.5
    values["rope_scaling"] |= {"attention_factor": None, "factor": 0.5}
    assert read(values).model.rope.long_mscale == 1.0


def test_without_longrope_the_whole_length_is_usable() -> None:
    for name, length in (("phi3_mini_4k", 4096), ("grin_moe", 4096), ("phi3_small_8k", 8192)):
        model = read(PUBLISHED[name]).model
        assert (model.rope.long_factor, model.usable_length) == (None, length)
    longer = changed("phi3_mini_4k", max_position_embeddings=16_384)
    assert read(longer).model.usable_length == 16_384


def test_a_missing_key_means_what_the_class_of_transformers_means() -> None:
    transformers = pytest.importorskip("transformers")
    for kind, cls in (("phi3", transformers.Phi3Config), ("phimoe", transformers.PhimoeConfig)):
        ours, theirs = read({"model_type": kind}), cls()
        # where a default is what both leave out, their class writes it down
        saved = theirs.to_dict()
        saved.pop("quantization_config", None)
        assert dataclasses.replace(read(saved), dtype=None) == ours
    assert read({"model_type": "phimoe"}).model.rope.theta == 1e6
    assert read({"model_type": "phi3"}).model.rope.theta == 1e4
    small = read({"model_type": "phi3small"}).model
    assert small == dataclasses.replace(read(PUBLISHED["phi3_small_8k"]).model, name=small.name)


def test_null_key_heads_means_as_many_as_query_heads() -> None:
    for kind in ("phi3", "phimoe", "phi3small"):
        assert read({"model_type": kind, "num_key_value_heads": None}).model.num_kv_heads == 32
    assert read({"model_type": "phi3"}).model.num_kv_heads == 32
    assert read({"model_type": "phimoe"}).model.num_kv_heads == 8


def test_a_head_width_is_read_and_never_guessed_where_it_is_given() -> None:
    slim = changed("grin_moe", num_attention_heads=16, num_key_value_heads=4, head_dim=128)
    assert (read(slim).model.head_dim, read(slim).model.num_heads) == (128, 16)
    assert read(changed("grin_moe", num_attention_heads=16)).model.head_dim == 256


@pytest.mark.parametrize(("window", "keys"), [("original", 2048), ("transformers", 2047)])
@pytest.mark.parametrize("name", ["phi3_mini_4k", "grin_moe"])
def test_who_counts_the_window_is_said_and_goes_both_ways(
    name: str, window: str, keys: int
) -> None:
    found = read(PUBLISHED[name], window=window)
    assert found.model.sliding_window == keys
    values = to_hf_config(found.model, found.router, dtype="bfloat16", window=window)
    assert values["sliding_window"] == 2047


def test_phimoe_takes_its_scales_from_the_file_and_needs_both() -> None:
    rope = read(PUBLISHED["phi35_moe"]).model.rope
    assert (rope.short_mscale, rope.long_mscale) == (1.243163121016122, 1.243163121016122)
    for key in ("short_mscale", "long_mscale"):
        values = changed("phi35_moe")
        del values["rope_scaling"][key]
        with pytest.raises(ConfigError, match=rf"rope_scaling: {key}: got nothing.*1\.2431"):
            read(values)


def test_phi_3_small_scales_the_short_regime_by_1_where_its_file_gives_no_number() -> None:
    rope = read(PUBLISHED["phi3_small_128k"]).model.rope
    assert rope.short_mscale == 1.0
    assert rope.long_mscale == pytest.approx(1.143544, abs=1e-6)
    values = changed("phi3_small_128k")
    values["rope_scaling"] |= {"short_mscale": 1.25, "long_mscale": 0}
    assert read(values).model.rope.short_mscale == 1.25
    assert read(values).model.rope.long_mscale == rope.long_mscale


def test_phi_3_small_is_read_whole() -> None:
    model = read(PUBLISHED["phi3_small_8k"]).model
    assert model.attention_scale == 1 / 128
    assert (model.embedding_multiplier, model.logit_divisor) == (10.0, 8.0)
    assert (model.embedding_dropout, model.feed_forward_dropout) == (0.1, 0.1)
    assert model.block_sparse == BlockSparseConfig(num_local_blocks=16)
    assert [model.block_sparse.is_sparse_layer(i) for i in range(4)] == [True, False, True, False]
    assert (model.tie_embeddings, model.attention_bias, model.head_bias) == (True, True, False)
    unscaled = read(changed("phi3_small_8k", mup_use_scaling=False)).model
    assert unscaled.attention_scale is None
    none_dense = read(changed("phi3_small_8k", dense_attention_every_n_layers=None)).model
    assert all(none_dense.block_sparse.is_sparse_layer(layer) for layer in range(32))


def test_the_masked_ids_are_those_that_no_text_of_the_tokenizer_has() -> None:
    assert read(PUBLISHED["phi3_small_8k"]).model.masked_tokens == SMALL_MASKED_TOKENS
    used = {*range(100_256), 100_257, 100_261, 100_262, 100_263, 100_266}
    assert used | set(SMALL_MASKED_TOKENS) == set(range(100_352))
    assert not used & set(SMALL_MASKED_TOKENS)
    assert read(changed("phi3_small_8k", vocab_size=512)).model.masked_tokens == ()


def test_the_router_is_that_of_the_file() -> None:
    expected = RouterConfig(
        mask_threshold=0.01, input_jitter=0.01, balance_coef=0.0, balance="pooled"
    )
    assert read(PUBLISHED["phi35_moe"]).router == expected
    values = changed("phi35_moe", router_jitter_noise=0.02, router_aux_loss_coef=0.5)
    found = read(values).router
    assert (found.mask_threshold, found.input_jitter, found.balance_coef) == (0.02, 0.01, 0.5)


REFUSED = [
    ("phi3_mini_4k", {"model_type": "phi3_v"}, "model_type: got 'phi3_v'.*phi3small"),
    ("phi3_mini_4k", {"model_type": "phi3smal"}, "Did you mean 'phi3small'"),
    ("phi3_mini_4k", {"hidden_act": "gelu"}, "hidden_act: got 'gelu'; allowed: 'silu'"),
    ("phi3_small_8k", {"hidden_act": "silu"}, "hidden_act: got 'silu'; allowed: 'gegelu'"),
    ("phi3_mini_4k", {"resid_pdrop": 0.1}, "resid_pdrop: got 0.1; allowed: 0.0.*copy"),
    ("phi3_mini_4k", {"attention_dropout": 0.1}, "attention_dropout"),
    ("phi35_moe", {"hidden_dropout": 0.1}, "hidden_dropout"),
    ("phi3_small_8k", {"attention_dropout_prob": 0.1}, "attention_dropout_prob"),
    ("phi35_moe", {"num_experts_per_tok": 4}, "num_experts_per_tok: got 4; allowed: 2"),
    ("phi35_moe", {"num_local_experts": 1}, "num_local_experts: got 1"),
    ("phi3_mini_4k", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("phi3_mini_4k", {"attention_bias": True}, "attention_bias: got true; allowed: false"),
    ("phi3_mini_4k", {"num_key_value_heads": 5}, "num_key_value_heads: got 5.*divisor.*32"),
    ("phi3_mini_4k", {"num_attention_heads": 7}, "num_attention_heads: got 7.*hidden_size=3072"),
    ("phi3_mini_4k", {"sliding_window": 0}, "sliding_window: got 0"),
    ("phi3_mini_4k", {"torch_dtype": "int4"}, "torch_dtype: got 'int4'; allowed: bfloat16"),
    ("phi3_mini_4k", {"rope_scaling": {"type": "linear", "factor": 2}}, "type: got 'linear'"),
    ("phi3_mini_4k", {"rope_scaling": {"short_factor": [1.0]}}, "short_factor.*type is 'default'"),
    ("phi3_mini_4k", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
    ("phi3_mini_4k", {"hidden_size": 2**40}, "hidden_size: got 1099511627776; allowed"),
    ("phi3_mini_4k", {"vocab_size": 2**31 - 1, "hidden_size": 32 * 2**20}, "10 trillion|1e\\+13"),
    ("phi3_small_8k", {"ff_dim_multiplier": 4}, "ff_dim_multiplier: got 4"),
    ("phi3_small_8k", {"rope_position_scale": 2.0}, "rope_position_scale"),
    ("phi3_small_8k", {"blocksparse_num_local_blocks": 0}, "blocksparse_num_local_blocks"),
    ("phi3_small_8k", {"dummy_token_indices": [1, 200_000]}, r"dummy_token_indices\[1\]"),
    ("phi3_small_8k", {"partial_rotary_factor": 0.5}, "partial_rotary_factor.*phi3small"),
    ("phi35_mini", {"original_max_position_embeddings": 1}, "original_max_position_embeddings"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_what_is_not_built_is_refused_by_name(
    name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(changed(name, **change))
    assert str(caught.value).startswith("config.json: ")


def test_a_wrong_length_of_a_list_says_the_right_one() -> None:
    values = changed("phi35_mini")
    values["rope_scaling"]["long_factor"] = values["rope_scaling"]["long_factor"][:-1]
    with pytest.raises(ConfigError, match=r"long_factor: got a list of 47.*48 numbers.*half of"):
        read(values)


# ---- 300 broken files

NASTY: list[Any] = [
    None, True, "", "seven", "1e3", -1, 0, 2**40, 10**400, 1.5, -0.5, float("nan"), float("inf"),
    float("-inf"), [], [[]], [None], {}, {"a": {"b": []}}, [1.0, "x"], "\ud800", 3.0e38, [3] * 48,
]  # fmt: skip
# read by nobody, so that nothing can be wrong with them
UNREAD = {
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "transformers_version", "output_router_logits", "gegelu_pad_to_256", "reorder_and_upcast_attn",
    "pad_sequence_to_multiple_of_64", "blocksparse_triton_kernel_block_size",
}  # fmt: skip


def broken_value(values: dict[str, Any], dice: random.Random) -> str:
    """Put a nasty value under one key, at the top or inside rope_scaling; the text of the file."""
    group = values
    if isinstance(values.get("rope_scaling"), dict) and dice.random() < 0.4:
        group = values["rope_scaling"]
    key = dice.choice([key for key in group if key not in UNREAD])
    group[key] = dice.choice(NASTY)
    return json.dumps(values)


def broken_entry(values: dict[str, Any], dice: random.Random) -> str:
    """One entry of a list of factors."""
    group = values.get("rope_scaling")
    if not isinstance(group, dict):
        return broken_value(values, dice)
    factors = group[dice.choice(["short_factor", "long_factor"])]
    wrong = dice.choice([None, "1.0", -1.0, 0, float("nan"), [1.0], True, 10**400])
    factors[dice.randrange(len(factors))] = wrong
    return json.dumps(values)


def missing_key(values: dict[str, Any], dice: random.Random) -> str:
    group = values.get("rope_scaling") or values
    del group[dice.choice(sorted(group))]
    return json.dumps(values)


def truncated(values: dict[str, Any], dice: random.Random) -> str:
    text = json.dumps(values)
    return text[: dice.randrange(len(text))]


def duplicate(values: dict[str, Any], dice: random.Random) -> str:
    key = dice.choice(sorted(values))
    return json.dumps(values)[:-1] + f", {json.dumps(key)}: 1}}"


def no_object(values: dict[str, Any], dice: random.Random) -> str:
    return dice.choice(["[]", "3", '"phi3"', "null", "NaN", "", "{]", "[[1]]", "true", "\0", "{}"])


def deep(values: dict[str, Any], dice: random.Random) -> str:
    opening = dice.choice(["[", '{"a":'])
    return f'{{"model_type": {opening * dice.randrange(3000, 200_000)}'


def long_number(values: dict[str, Any], dice: random.Random) -> str:
    return json.dumps(values)[:-1] + f', "hidden_size_2": {"9" * 5000}}}'


def not_utf_8(values: dict[str, Any], dice: random.Random) -> str:
    text = json.dumps(values)
    place = dice.randrange(len(text))
    return text[:place] + "\udcff" + text[place:]  # written as the byte 0xff


BREAKS: list[tuple[Callable[[dict[str, Any], random.Random], str], int]] = [
    (broken_value, 8), (broken_entry, 2), (missing_key, 1), (truncated, 2), (duplicate, 1),
    (no_object, 1), (deep, 1), (long_number, 1), (not_utf_8, 1),
]  # fmt: skip


def test_300_broken_files_give_one_clear_message_each(tmp_path: Path) -> None:
    dice = random.Random(7)
    file, num_refused, messages, num_harmless = tmp_path / "config.json", 0, set(), 0
    while num_refused < 300:
        values = copy.deepcopy(PUBLISHED[dice.choice(sorted(PUBLISHED))])
        breaks, weights = zip(*BREAKS, strict=True)
        (made_by,) = dice.choices(breaks, weights)
        text = made_by(values, dice)
        # a lone surrogate inside JSON text is escaped; only not_utf_8 writes a wrong byte
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        try:
            found = load_hf_config(dice.choice([file, tmp_path]))
        except ConfigError as error:
            message = str(error)
            assert message.startswith(f"{file}: ")
            assert len(message) < 600
            assert message.isprintable()
            assert message.endswith(".") or message.endswith(").")
            num_refused += 1
            messages.add(message)
        else:  # harmless: a missing key has a default, and null may be a value
            assert made_by in (broken_value, broken_entry, missing_key)
            num_harmless += 1
            assert found.model.num_parameters() > 0
    assert len(messages) > 120
    assert num_harmless < 120


@pytest.mark.parametrize("number", [float("nan"), float("inf"), True, "1.0", None, -1.0, 0.0])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "initializer_range"])
def test_a_number_must_be_finite_and_above_0(key: str, number: Any) -> None:
    if key == "rope_theta" and number is None:
        return  # as if it were missing, for transformers 5 gives it elsewhere
    with pytest.raises(ConfigError, match=rf"config\.json: {key}: got .*; allowed: a number above"):
        read(changed("phi3_mini_4k", **{key: number}))


@pytest.mark.parametrize("number", [True, 32.0, "32", None, 0, -4, 2**31, [32]])
def test_a_size_must_be_a_whole_number(number: Any) -> None:
    with pytest.raises(ConfigError, match=r"num_hidden_layers: got .*; allowed: a whole number"):
        read(changed("phi3_mini_4k", num_hidden_layers=number))


def test_a_key_that_stands_twice_is_refused_at_any_depth(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in (
        '{"model_type": "phi3", "vocab_size": 64, "vocab_size": 128}',
        '{"model_type": "phi3", "x": [{"vocab_size": 64, "vocab_size": 64}]}',
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match="'vocab_size': stands twice"):
            load_hf_config(file)


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: cannot be read.*Give a config\.json"):
        load_hf_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        load_hf_config(tmp_path)
    with pytest.raises(ConfigError, match="null byte"):
        load_hf_config("a\0b")
    with pytest.raises(ConfigError, match=r"~nobody_of_this_name/x: .*home"):
        load_hf_config("~nobody_of_this_name/x")
    large = tmp_path / "model.safetensors"
    large.write_bytes(b" " * (5 * 2**20))
    with pytest.raises(ConfigError, match="has more than"):
        load_hf_config(large)


def test_a_window_that_nobody_counts_is_refused() -> None:
    with pytest.raises(ConfigError, match="window: got 'left'; allowed: original, transformers"):
        read(PUBLISHED["phi3_mini_4k"], window="left")


# ---- and back


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("window", ["original", "transformers"])
def test_a_published_model_is_written_and_read_back(name: str, window: str) -> None:
    found = read(PUBLISHED[name], window=window)
    written = to_hf_config(found.model, found.router, dtype="bfloat16", window=window)
    assert "auto_map" not in written
    again = read(written, window=window)
    assert dataclasses.replace(again.model, name=found.model.name) == found.model
    assert (again.router, again.family, again.dtype) == (found.router, found.family, "bfloat16")
    assert json.loads(json.dumps(written)) == written
    # the keys of the published file that both have say the same
    said = {"su": "longrope"}
    for key, value in written.items():
        if key in PUBLISHED[name] and key not in ("architectures", "model_type", "pad_token_id"):
            original = copy.deepcopy(PUBLISHED[name][key])
            if key == "rope_scaling" and original is not None:
                original["type"] = said.get(original["type"], original["type"])
                if family_of(found.model) == "phi3small":  # -1: computed; we write what it is
                    value = value | dict.fromkeys(("short_mscale", "long_mscale"), -1.0)
            assert value == original, key


# in the published files only: their own code, the version that wrote them, and what no class reads
_NOT_WRITTEN = {"auto_map", "transformers_version"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_written_has_the_names_keys_and_ids_of_the_published_file(name: str) -> None:
    published = PUBLISHED[name]
    found = read(published)
    written = to_hf_config(found.model, found.router, dtype="bfloat16")
    assert published.keys() - written.keys() <= _NOT_WRITTEN
    # GRIN-MoE, which needs its own code, is exported as the family that transformers has
    is_grin = published["model_type"] == "grinmoe"
    expected = ["PhiMoEForCausalLM"] if is_grin else published["architectures"]
    assert written["architectures"] == expected
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert type(written[key]) is int
        assert written[key] == (published.get(key) or written[key])


def random_model(dice: random.Random) -> tuple[ModelConfig, RouterConfig]:
    """Any model that a published architecture can hold."""
    family = dice.choice(["phi3", "phimoe", "phi3small"])
    num_kv_heads, head_dim = dice.choice([1, 2, 3]), dice.choice([8, 16, 32])
    num_heads = num_kv_heads * dice.choice([1, 2, 4])
    fraction = dice.choice([1.0, 0.5, 0.75]) if family == "phi3" else 1.0
    max_position = dice.choice([16, 512, 131_072])
    original, theta = max_position, dice.choice([1e4, 1e6, 500.5])
    rope = RopeConfig(theta=theta, original_max_position=original, rotary_fraction=fraction)
    is_long = dice.random() < 0.6
    if is_long:
        count = int(head_dim * fraction) // 2
        scale = dice.uniform(0.9, 1.5)
        rope = dataclasses.replace(
            rope,
            original_max_position=dice.choice([2, 16, 4096]),
            short_factor=tuple(dice.uniform(1, 3) for _ in range(count)),
            long_factor=tuple(dice.uniform(1, 64) for _ in range(count)),
            short_mscale=scale,
            long_mscale=scale if family == "phi3" else dice.uniform(0.9, 1.5),
        )
    hidden = num_heads * head_dim
    if family == "phimoe" or (family == "phi3" and not is_long):
        hidden = dice.choice([hidden, 40])
    common: dict[str, Any] = {
        "vocab_size": dice.choice([64, 32_064, 100_352]), "hidden_size": hidden,
        "num_layers": dice.choice([1, 2, 5]), "num_heads": num_heads,
        "num_kv_heads": num_kv_heads, "head_dim": head_dim,
        "intermediate_size": dice.choice([8, 24]), "max_position": max_position, "rope": rope,
        "norm_eps": dice.choice([1e-5, 1e-6]), "tie_embeddings": dice.random() < 0.5,
        "initializer_range": dice.choice([0.02, 0.01]),
    }  # fmt: skip
    window = dice.choice([None, 2, 100])
    if family == "phimoe":
        router = RouterConfig(
            mask_threshold=dice.choice([0.0, 0.01, 0.3]), input_jitter=dice.choice([0.0, 0.01]),
            balance_coef=dice.choice([0.0, 0.1]), balance="pooled",
        )  # fmt: skip
        return ModelConfig(
            **common, num_experts=dice.choice([2, 16]), sliding_window=window,
            attention_bias=dice.random() < 0.5, head_bias=dice.random() < 0.5,
        ), router  # fmt: skip
    if family == "phi3":
        return ModelConfig(
            **common, num_experts=0, norm="rmsnorm", attention_bias=False, head_bias=False,
            sliding_window=window, embedding_dropout=dice.choice([0.0, 0.1]),
        ), RouterConfig()  # fmt: skip
    sparse = BlockSparseConfig(
        num_local_blocks=dice.choice([1, 16]), block_size=dice.choice([4, 64]),
        vertical_stride=dice.choice([3, 8]), is_same_for_all_heads=dice.random() < 0.5,
        dense_every=dice.choice([0, 1, 2]),
    )  # fmt: skip
    return ModelConfig(
        **common, num_experts=0, attention_bias=True, head_bias=False, feed_forward="gegelu",
        feed_forward_bias=True, gegelu_limit=dice.choice([20.0, 7.5]),
        attention_scale=dice.choice([None, 1 / head_dim, 0.3]),
        embedding_multiplier=dice.choice([1.0, 10.0]), logit_divisor=dice.choice([1.0, 8.0]),
        masked_tokens=dice.choice([(), (0, 7, 63)]), embedding_dropout=0.1,
        feed_forward_dropout=dice.choice([0.0, 0.1]),
        block_sparse=dice.choice([sparse, BlockSparseConfig()]),
    ), RouterConfig()  # fmt: skip


@pytest.mark.parametrize("window", ["original", "transformers"])
def test_300_random_models_are_written_and_read_back(window: str) -> None:
    dice = random.Random(3)
    for _ in range(300):
        model, router = random_model(dice)
        written = json.loads(
            json.dumps(to_hf_config(model, router, dtype="float32", window=window))
        )
        found = read(written, window=window)
        assert dataclasses.replace(found.model, name=model.name) == model
        assert found.router == router
        assert config_describes(written, model, router, where="config.json", window=window)


def test_transformers_opens_what_is_written_and_means_the_same() -> None:
    transformers = pytest.importorskip("transformers")
    dice, num_compared = random.Random(11), 0
    for _ in range(60):
        model, router = random_model(dice)
        written = to_hf_config(model, router, dtype="float32", window="transformers")
        if written["model_type"] == "phi3small":
            continue
        theirs = transformers.AutoConfig.for_model(**written)
        assert (
            theirs.__class__.__name__
            == {"phi3": "Phi3Config", "phimoe": "PhimoeConfig"}[written["model_type"]]
        )
        # what transformers saves of it is the same model again
        saved = json.loads(json.dumps(theirs.to_dict(), default=str))
        found = read(saved, window="transformers")
        assert dataclasses.replace(found.model, name=model.name) == model
        num_compared += 1
    assert num_compared > 20


def test_a_model_without_known_factors_is_written_up_to_its_usable_length() -> None:
    published = read(PUBLISHED["phi35_moe"])
    unknown = dataclasses.replace(published.model.rope, short_factor=None, long_factor=None)
    model = dataclasses.replace(published.model, rope=unknown)
    written = to_hf_config(model, published.router, dtype="bfloat16")
    found = read(written).model
    assert (found.max_position, found.usable_length) == (4096, model.usable_length)
    assert found.rope.short_factor == (1.0,) * 64
    assert found.rope.short_mscale == model.rope.short_mscale


def test_a_file_describes_its_model_until_the_model_changes() -> None:
    values = PUBLISHED["phi35_moe"]
    found = read(values)

    def describes(model: ModelConfig = found.model, router: RouterConfig = found.router) -> bool:
        return config_describes(values, model, router, where="config.json")

    assert describes()
    assert describes(dataclasses.replace(found.model, name="other"))
    assert describes(router=dataclasses.replace(found.router, balance="per_layer", z_coef=0.1))
    assert not describes(dataclasses.replace(found.model, norm_eps=1e-6))
    for key in ("mask_threshold", "input_jitter", "balance_coef"):
        assert not describes(router=dataclasses.replace(found.router, **{key: 0.02}))


NOT_HELD = [
    ("phi3_mini_4k", {"norm": "layernorm"}, "model.norm: got 'layernorm'.*phi3.*'rmsnorm'"),
    ("phi3_mini_4k", {"attention_bias": True}, "model.attention_bias"),
    ("phi3_mini_4k", {"logit_divisor": 2.0}, "model.logit_divisor"),
    ("phi3_mini_4k", {"attention_scale": 0.1}, "model.attention_scale"),
    ("phi3_mini_4k", {"sliding_window": 1}, "model.sliding_window: got 1"),
    ("phi35_mini", {"hidden_size": 1024}, "model.head_dim: got 96.*32"),
    ("phi35_moe", {"norm": "rmsnorm"}, "model.norm"),
    ("phi35_moe", {"top_k": 1}, "model.top_k: got 1"),
    ("phi35_moe", {"embedding_dropout": 0.1}, "model.embedding_dropout"),
    ("phi3_small_8k", {"head_bias": True}, "model.head_bias"),
    ("phi3_small_8k", {"hidden_size": 1024}, "model.head_dim"),
]


@pytest.mark.parametrize(("name", "change", "message"), NOT_HELD)
def test_a_model_without_a_published_format_is_refused(
    name: str, change: dict[str, Any], message: str
) -> None:
    found = read(PUBLISHED[name])
    model = dataclasses.replace(found.model, **change)
    with pytest.raises(ConfigError, match=message):
        to_hf_config(model, found.router, dtype="float32")


def test_another_router_and_other_scales_have_no_published_format() -> None:
    found = read(PUBLISHED["phi35_moe"])
    with pytest.raises(ConfigError, match=r"router\.name: got 'topk'"):
        to_hf_config(found.model, RouterConfig(name="topk"), dtype="float32")
    mini = read(PUBLISHED["phi35_mini"]).model
    rope = dataclasses.replace(mini.rope, long_mscale=1.5)
    with pytest.raises(ConfigError, match=r"model\.rope\.long_mscale: got 1.5"):
        to_hf_config(dataclasses.replace(mini, rope=rope), found.router, dtype="float32")


def test_a_model_with_vision_is_called_one() -> None:
    with pytest.raises(ConfigError, match=r"model_type: got 'phi3_v', Phi-3 with vision"):
        read(changed("phi3_mini_4k", model_type="phi3_v"))


@pytest.mark.parametrize("key", ["hidden_dropout ", " rope_theta", "sliding_window\n"])
def test_a_key_with_white_space_at_an_end_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=r"has white space at an end.* allowed: '\w+'"):
        read({**PUBLISHED["phi3_mini_4k"], key: 1})


def test_two_places_for_rotary_positions_must_agree() -> None:
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    both = {"rope_scaling": {"rope_type": "default"}, "rope_parameters": plain}
    assert read(changed("phi3_mini_4k", **both)).model.rope.theta == 10_000.0
    for change, words in (
        (
            {"rope_parameters": {**plain, "rope_theta": 5e5}},
            "rope_theta: got 500000.0; allowed: 10",
        ),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 7.0}}, "as in rope_scaling"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type: got 'longrope'"),
    ):
        with pytest.raises(ConfigError, match=f"rope_parameters: {words}|{words}"):
            read(changed("phi3_mini_4k", **{**both, **change}))
