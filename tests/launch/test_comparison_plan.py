"""Which runs a comparison needs: sizes that match, FLOPs that are equal, keys that mean a run."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from moe.compare_config import ArmConfig, CompareConfig, ContrastConfig
from moe.config import TrainConfig
from moe.config_from_dict import from_dict
from moe.errors import ConfigError
from moe.model_config import ModelConfig

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "launch"))  # as launch/ itself is found there

from compare import compose_training  # noqa: E402
from comparison_plan import PlannedRun, flops_per_step, plan, run_key  # noqa: E402

CONF = ROOT / "conf"
NAMES = sorted(path.stem for path in (CONF / "comparison").glob("*.yaml"))
Compose = Callable[[Sequence[str]], TrainConfig]


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    """The real composition of launch/train.py."""
    ConfigStore.instance().store(name="train_defaults", node=dataclasses.asdict(TrainConfig()))
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        once = functools.lru_cache(lambda overrides: compose_training(overrides))
        yield lambda overrides: once(tuple(overrides))


def comparison(name: str) -> CompareConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "comparison" / f"{name}.yaml"))
    return from_dict(CompareConfig, values)  # type: ignore[arg-type]


def model(name: str) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    return from_dict(ModelConfig, values)  # type: ignore[arg-type]


def by_arm(runs: list[PlannedRun]) -> dict[str, PlannedRun]:
    return {run.arm: run for run in runs if run.seed == 0}


def test_the_four_comparisons_of_the_issue_are_there() -> None:
    assert {"dense_and_sparse", "routers", "upcycling", "shapes"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_comparison_plans_at_least_three_seeds_and_says_what_is_published(
    name: str, compose: Compose
) -> None:
    config = comparison(name)
    assert config.name == name
    assert (CONF / "experiment" / f"{config.experiment}.yaml").is_file()
    assert len(config.seeds) >= 3
    assert all((config.title, config.question, config.published, config.source, config.contrasts))
    runs = plan(config, compose)
    assert len(runs) == len(config.seeds) * len(config.arms)
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        assert run.config.train.precision in ("float32", "bfloat16")  # auto differs by machine
        assert run.config.train.sample_tokens == 0
        assert run.config.train.steps % run.config.train.evaluate_every < run.config.train.steps / 6


def test_the_dense_models_have_the_active_and_the_total_size_of_the_moe() -> None:
    sparse = model("micro_moe")
    active, total = model("micro_dense_active"), model("micro_dense_total")
    assert (sparse.num_experts, sparse.top_k) == (16, 2)
    assert active.num_parameters() == pytest.approx(sparse.num_parameters(active=True), rel=0.01)
    assert total.num_parameters() == pytest.approx(sparse.num_parameters(), rel=0.01)
    same = ("norm", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "attention_bias")
    for key in same:
        assert {getattr(m, key) for m in (active, total)} == {getattr(sparse, key)}, key


def test_the_shapes_have_one_size_and_the_features_of_their_families() -> None:
    mini, small, medium = (model(f"micro_{name}") for name in ("mini", "small", "medium"))
    sizes = [m.num_parameters() for m in (mini, small, medium)]
    assert max(sizes) < 1.01 * min(sizes)
    assert mini.num_heads == mini.num_kv_heads
    assert medium.num_heads == 4 * medium.num_kv_heads
    assert (small.feed_forward, small.norm, small.tie_embeddings) == ("gegelu", "layernorm", True)
    assert small.attention_scale == pytest.approx(1 / small.head_dim)
    sparse = small.block_sparse
    assert sparse.num_local_blocks * sparse.block_size * 2 < 256  # it bites within a window


def test_equal_flops_are_counted_as_by_hand(compose: Compose) -> None:
    arms = by_arm(plan(comparison("dense_and_sparse"), compose))
    moe, dense = arms["moe"], arms["dense_total_flops"]
    # forward, one token, 256 of them: 4 layers of attention (4 heads of 32, 2 key heads), a head
    attention = 4 * (2 * 128 * (2 * 128 + 2 * 64) + 4 * 32 * 4 * 257 / 2)
    head = 2 * 128 * 2048
    sparse_token = 3 * (attention + head + 4 * (2 * 128 * 16 + 2 * 6 * 128 * 200))
    dense_token = 3 * (attention + head + 4 * 6 * 128 * 3205)
    assert moe.flops == pytest.approx(600 * 8 * 256 * sparse_token, rel=1e-12)
    assert flops_per_step(dense.config) == pytest.approx(8 * 256 * dense_token, rel=1e-12)
    assert dense.config.train.steps == round(600 * sparse_token / dense_token) == 132
    assert dense.total_flops == pytest.approx(moe.total_flops, rel=0.5 / 132)
    assert arms["dense_active"].total_flops == pytest.approx(moe.total_flops, rel=0.01)
    assert dense.config.optim.warmup_steps == round(40 * 132 / 600)


def test_flops_of_a_start_are_counted_with_what_started_from_it(compose: Compose) -> None:
    arms = by_arm(plan(comparison("upcycling"), compose))
    parent, upcycled, scratch = arms["parent"], arms["upcycled"], arms["scratch_flops"]
    assert upcycled.total_flops == pytest.approx(parent.flops + upcycled.flops)
    assert upcycled.total_tokens == 900 * 2048
    assert scratch.total_flops == pytest.approx(upcycled.total_flops, rel=0.5 / 700)
    assert f"train.init_from='{parent.folder}'" in upcycled.arguments
    assert upcycled.config.seed == arms["scratch"].config.seed != parent.config.seed


def test_one_run_that_two_comparisons_need_has_one_folder(compose: Compose) -> None:
    moe = by_arm(plan(comparison("dense_and_sparse"), compose))["moe"]
    sparsemixer = by_arm(plan(comparison("routers"), compose))["sparsemixer"]
    assert moe.folder == sparsemixer.folder
    assert moe.overrides != sparsemixer.overrides  # written differently, the same run


def planned(compose: Compose, *overrides: str, **arm: object) -> PlannedRun:
    first = ArmConfig("first")
    second = ArmConfig("second", overrides=overrides, **arm)  # type: ignore[arg-type]
    config = CompareConfig(name="x", experiment="nano", arms=(first, second), seeds=(0,))
    return plan(config, compose)[1]


@pytest.mark.parametrize(
    ("overrides", "is_same"),
    [
        (["logging=offline"], True),
        (["name=other"], True),
        (["router=sparsemixer"], True),
        (["router.balance_coef=0.0"], False),
        (["optim.lr=1e-3"], False),
        (["data.seq_len=32"], False),
        (["model.num_kv_heads=4"], False),
        (["train.precision=float32"], False),
    ],
)
def test_a_key_changes_with_what_is_trained_and_with_nothing_else(
    overrides: list[str], is_same: bool, compose: Compose
) -> None:
    assert (planned(compose).key == planned(compose, *overrides).key) is is_same


def test_a_run_from_other_weights_is_another_run(compose: Compose) -> None:
    assert planned(compose).key != planned(compose, starts_from="first").key


def test_a_key_is_found_again_in_what_a_run_wrote_down(compose: Compose) -> None:
    run = planned(compose, "optim.lr=1e-3")
    written = dataclasses.asdict(run.config)
    written["data"]["sources"] = ["somewhere"]  # decided when the data were prepared
    written["train"]["a_key_that_is_no_more"] = None
    assert run_key(written, starts_from=None) == run.key
    written["optim"]["lr"] = 2e-3
    assert run_key(written, starts_from=None) != run.key


def test_an_arm_that_cannot_train_is_named(compose: Compose) -> None:
    with pytest.raises(ConfigError, match=r"arm second: train.trace_every: got 5 with model tiny_"):
        planned(compose, "model=tiny_dense", "data.seq_len=64", "train.trace_every=5")


ARMS = (ArmConfig("one"), ArmConfig("two"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"contrasts": (ContrastConfig("one", "three"),)}, r"contrasts\[0\].against: got 'three'"),
        ({"contrasts": (ContrastConfig("one", "one"),)}, "against itself"),
        ({"contrasts": (ContrastConfig("one", "two", "less"),)}, "expects: got 'less'"),
        ({"arms": (ArmConfig("one", flops_of="two"), ArmConfig("two"))}, r"arms\[0\].flops_of"),
        ({"arms": (*ARMS, ArmConfig("x", starts_from="tow"))}, "Did you mean 'two'"),
        ({"arms": (*ARMS, ArmConfig("one"))}, r"arms\[2\].name: got 'one'"),
        ({"arms": (ArmConfig("a b"),)}, "small letters, digits"),
        ({"arms": (ArmConfig("one", overrides=("seed=3",)),)}, "decided for every run"),
        ({"arms": (ArmConfig("one", overrides=("model",)),)}, "key=value"),
        ({"overrides": "paths.run_dir=x"}, "decided for every run"),
        ({"overrides": "name='x"}, "a shell would not read"),
        ({"seeds": (1, 1)}, "each once"),
        ({"seeds": ()}, "at least one"),
        ({"evaluations": 0}, "evaluations"),
        ({"name": "../x"}, "names the report's folder"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(
    settings: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        CompareConfig(**{"name": "x", "experiment": "nano", "arms": ARMS} | settings)  # type: ignore[arg-type]
