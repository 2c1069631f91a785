"""Every wrong value is one ConfigError that names its key; every right one builds."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe.config import DataConfig, PrepareConfig, TrainConfig
from moe.config_from_dict import from_dict, known_keys
from moe.errors import ConfigError
from moe.model_config import ModelConfig, RopeConfig

LEAVES = [
    key
    for key in known_keys(TrainConfig)
    if not any(other.startswith(f"{key}.") for other in known_keys(TrainConfig))
]
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([12, 24, 10**7, 10**9, 2**63, -(2**70), 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1.0, 0.5, -0.0, 1e-300]),
)
TEXTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        ["sparsemixer", "topk", "auto", "global", "pooled", "layernorm", "rmsnorm", "wsd",
         "constant", "plain", "never", "online", "1e-3", "nan", "null", "3", "true", "_target_"]
    ),
)  # fmt: skip
LISTS = st.lists(st.one_of(NUMBERS, TEXTS, st.none()), max_size=3)
# numbers more often than the rest, because most keys take one
VALUES = st.one_of(
    NUMBERS, NUMBERS, TEXTS, st.booleans(), st.none(), LISTS, st.just({}), st.just({"a": 1})
)
UNKNOWN = st.sampled_from(["model._target_", "model.hiden_size", "extra", "train.train", "rope"])


def valid() -> dict[str, Any]:
    """A configuration as YAML gives it: lists for tuples."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(TrainConfig()))


def with_value(values: dict[str, Any], path: str, value: Any) -> None:
    *groups, last = path.split(".")
    for group in groups:
        if not isinstance(values.get(group), dict):
            return  # an earlier change replaced the group
        values = values[group]
    values[last] = value


@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,  # the same examples everywhere; change the strategies to look further
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    changes=st.lists(
        st.tuples(st.one_of(st.sampled_from(LEAVES), UNKNOWN), VALUES), min_size=1, max_size=3
    )
)
def test_changed_configurations_build_or_name_the_key(changes: list[tuple[str, Any]]) -> None:
    values = valid()
    for path, value in changes:
        with_value(values, path, value)
    built, message = built_or_message(values)
    if built is not None:
        assert_types(built)
        return
    # it begins with a key, or with its group: `model.rope: short_factor and long_factor come ...`
    start = message.split(":")[0].split("[")[0]
    named = {start} & set(known_keys(TrainConfig)) or [p for p, _ in changes if is_at(p, start)]
    assert named, message
    assert len(message) > len(start) + 10
    assert len(message) < 2000  # one message, not a flood


def built_or_message(values: dict[str, Any]) -> tuple[TrainConfig | None, str]:
    """Any other exception than ConfigError goes through, and fails the test."""
    try:
        return from_dict(TrainConfig, values), ""
    except ConfigError as error:
        return None, str(error)


def is_at(path: str, start: str) -> bool:
    """a.b is at a.b, and at a.b.c where the value of a.b was a group with the key c."""
    return path == start or start.startswith(f"{path}.")


def assert_types(config: Any) -> None:
    """A configuration that was built holds what its annotations say, and only finite numbers."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            assert_types(value)
        else:
            assert fits(value, hint), f"{type(config).__name__}.{name}: {value!r} is no {hint}"


def fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, inner) for inner in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return type(value) is tuple and all(fits(item, inner) for item in value)
    if hint is float:
        return type(value) is float and math.isfinite(value)
    return value is None if hint is type(None) else type(value) is hint


def test_the_valid_configuration_is_the_default() -> None:
    assert from_dict(TrainConfig, valid()) == TrainConfig()
    assert from_dict(PrepareConfig, {}) == PrepareConfig()


@pytest.mark.parametrize("key", LEAVES)
def test_a_list_of_groups_is_refused_at_every_key(key: str) -> None:
    values = valid()
    with_value(values, key, [{"a": 1}])
    with pytest.raises(ConfigError, match=f"^{key}"):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"model.hiden_size": 3},
            "model.hiden_size: unknown key. Did you mean 'model.hidden_size'?",
        ),
        ({"model._target_": "os.system"}, "model._target_: unknown key."),
        ({"train.steps": "many"}, "train.steps: got 'many' of type str; it must be a whole number"),
        ({"train.steps": True}, "train.steps: got True of type bool"),
        ({"train.steps": 2.5}, "train.steps: got 2.5 of type float"),
        ({"train.steps": 0}, "train.steps: got 0; it must be a finite number of at least 1"),
        ({"optim.lr": "fast"}, "optim.lr: got 'fast'; it must be a number"),
        ({"optim.lr": float("nan")}, "optim.lr: got nan"),
        ({"optim.lr": "inf"}, "optim.lr: got inf"),
        ({"optim.lr": -1}, "optim.lr: got -1.0"),
        ({"optim.beta2": 1.0}, "optim.beta2: got 1.0; it must be at least 0 and below 1"),
        ({"optim.schedule": "cosin"}, "Did you mean 'cosine'?"),
        (
            {"optim.warmup_steps": 9, "train.steps": 8},
            "optim.warmup_steps: got 9; it must be at mo",
        ),
        ({"router.name": "sparsemixr"}, "Did you mean 'sparsemixer'?"),
        ({"router.renormalise": True}, "router.renormalise: got true with router.name=sparsemixer"),
        ({"model.top_k": 3}, "model.top_k: got 3; SparseMixer-v2 is defined for 2"),
        ({"model.top_k": 17, "router.name": "topk"}, "allowed: 1 to model.num_experts=16"),
        ({"model.num_kv_heads": 3}, "model.num_kv_heads: got 3; it must divide model.num_heads=4"),
        ({"model.head_dim": 63}, "rotates 63; rotary needs an even number"),
        ({"model.sliding_window": 0}, "model.sliding_window: got 0"),
        ({"model.rope.theta": 0}, "model.rope.theta: got 0.0"),
        ({"model.rope.long_mscale": float("nan")}, "model.rope.long_mscale: got nan"),
        ({"model.rope.short_factor": [1.0]}, "model.rope: short_factor and long_factor come"),
        ({"data.sources": "texts"}, "data.sources: got 'texts'; it must be a list"),
        ({"data.sources": []}, "data.sources: got an empty list"),
        ({"data.seq_len": 4097}, "data.seq_len: got 4097; model tiny_moe takes at most 4096"),
        ({"data.validation_fraction": 0}, "data.validation_fraction: got 0.0"),
        ({"train.micro_batch_size": 5, "train.batch_size": 8}, "batch_size=8. Allowed: 1, 2, 4, 8"),
        ({"train.batch_size": 10**9, "train.micro_batch_size": 7}, "Allowed: 1, 2, 4, 5, 8, 10"),
        ({"train.steps": 10**400}, "train.steps: got a number of 1329 bits"),
        ({"optim.lr": 10**400}, "optim.lr: got a number of 1329 bits"),
        ({"train.resume": "yes"}, "train.resume: got 'yes'; allowed: auto, never"),
        ({"parallel.zero_stage": 4}, "parallel.zero_stage: got 4; allowed: 0, 1, 2, 3"),
        (
            {"parallel.engine": "plain", "parallel.zero_stage": 1},
            "parallel.zero_stage: got 1 with parallel.engine='plain'",
        ),
        ({"parallel.bf16_parameters": True}, "parallel.bf16_parameters: got true with parallel.ze"),
        ({"parallel.offload_optimizer": True}, "Set parallel.zero_stage to 1, 2 or 3"),
        (
            {
                "parallel.zero_stage": 2,
                "parallel.bf16_parameters": True,
                "train.precision": "float32",
            },
            "got true with train.precision=float32",
        ),
        ({"parallel.expert_parallel_size": 3}, "it must divide model.num_experts=16"),
        (
            {"parallel.expert_parallel_size": 2, "model.num_experts": 0, "model.top_k": 0},
            "parallel.expert_parallel_size: got 2 with model tiny_moe, which has no experts",
        ),
        ({"seed": -1}, "seed: got -1; it must be "),
        ({"model": 3}, "model: got 3; it must be a group of keys"),
        ({"logging.group": 3}, "logging.group: got 3 of type int; it must be text"),
    ],
)
def test_a_mistake_is_answered_with_its_key_value_and_what_is_allowed(
    changes: dict[str, Any], words: str
) -> None:
    values = valid()
    for path, value in changes.items():
        with_value(values, path, value)
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, values)
    assert words in str(caught.value)


def test_long_rope_factors_need_half_the_head_width_and_extend_the_usable_length() -> None:
    with pytest.raises(ConfigError, match="got 3 numbers; allowed: 32"):
        ModelConfig(rope=RopeConfig(short_factor=(1.0,) * 3, long_factor=(1.0,) * 3))
    rope = RopeConfig(short_factor=(1.0,) * 32, long_factor=(2.0,) * 32, original_max_position=64)
    assert ModelConfig(rope=rope, max_position=512).usable_length == 512
    assert ModelConfig(rope=RopeConfig(original_max_position=64)).usable_length == 64


def test_micro_batches_of_all_ranks_must_divide_the_batch() -> None:
    values = valid()
    values["train"] |= {"batch_size": 24, "micro_batch_size": 4}
    config = from_dict(TrainConfig, values)
    assert [config.num_accumulation_steps(n) for n in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ConfigError, match=r"train.batch_size.*24.*micro_batch_size=4 times 4"):
        config.num_accumulation_steps(4)


def test_a_number_written_as_yaml_reads_it_is_a_number() -> None:
    values = valid()
    values["optim"] |= {"lr": "1e-3", "weight_decay": 1}
    config = from_dict(TrainConfig, values)
    assert (config.optim.lr, config.optim.weight_decay) == (1e-3, 1.0)


@pytest.mark.parametrize(
    ("size", "world_size", "num_experts", "message"),
    [
        (3, 4, 12, r"got 3 with 4 process\(es\), .* allowed here: 1, 2, 4"),
        (8, 4, 16, r"got 8 with 4 process\(es\)"),
        (4, 6, 16, r"allowed here: 1, 2\. Choose"),
    ],
)
def test_processes_that_expert_groups_do_not_divide_are_refused(
    size: int, world_size: int, num_experts: int, message: str
) -> None:
    values = valid()
    values["parallel"]["expert_parallel_size"] = size
    values["model"]["num_experts"] = num_experts
    values["train"] |= {"batch_size": 24, "micro_batch_size": 1}
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values).check_processes(world_size)


def test_processes_that_expert_groups_divide_are_not() -> None:
    values = valid()
    values["train"] |= {"batch_size": 4, "micro_batch_size": 1}
    for size in (1, 2, 4):
        values["parallel"]["expert_parallel_size"] = size
        from_dict(TrainConfig, values).check_processes(4)


@pytest.mark.parametrize("name", ["", ".", "../x", "a/../../x", "/elsewhere"])
def test_the_name_of_data_stays_below_their_folder(name):
    with pytest.raises(ConfigError, match=r"data\.name: got .* paths\.data_dir=FOLDER"):
        DataConfig(name=name)
