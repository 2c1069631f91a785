"""Every file under conf/ composes, by the real command, into a checked TrainConfig that builds."""

from __future__ import annotations

import dataclasses
import importlib
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import moe.data.manifest
import moe.data.prepare
import moe.train.run
from moe.config import PrepareConfig, TrainConfig
from moe.convert.hf_config import load_hf_config
from moe.model.transformer import build_model
from moe.model_config import ModelConfig

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
# only launch/prepare_data.py has the option, launch/plan.py and launch/compare.py the groups
NOT_FOR_TRAINING = {"paths=data_only"}
GROUPS_OF_THE_PLANNER = {"cluster"}
GROUPS_OF_COMPARISONS = {"comparison"}
# what an option cannot know
NEEDED = {
    "data=files": ["data.sources=[my_texts]"],
    "launcher=hostfile": ["launcher.hostfile=hosts.txt"],
    "experiment=phi35_moe_pretrain": [
        "launcher=slurm",
        "launcher.num_nodes=8",
        "launcher.processes_per_node=8",
    ],
}

PUBLISHED_FOLDER = REPOSITORY / "tests/moe/convert/published"
PUBLISHED = sorted(path.stem for path in PUBLISHED_FOLDER.glob("*.json"))
LISTS_NOT_PUBLISHED = {"phi35_moe", "phi3_medium_128k", "phi3_small_128k"}
FAMILY = [
    "phi3_mini_4k", "phi3_mini_128k", "phi3_mini_128k_april", "phi35_mini", "phi3_small_8k",
    "phi3_small_128k", "phi3_medium_4k", "phi3_medium_128k", "phi35_moe", "grin_moe",
]  # fmt: skip

Compose = Callable[..., TrainConfig]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    folders = {path.name for path in CONF.iterdir() if path.is_dir()}
    return sorted(folders - GROUPS_OF_THE_PLANNER - GROUPS_OF_COMPARISONS)


EVERY_OPTION = [f"{group}={option}" for group in groups() for option in options(group)]


class Reached(Exception):
    """The command has checked its configuration and begins to work."""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run launch/<name>.py up to its work, and return the configuration that it begins with."""
    seen: list[Any] = []

    def begin(config: Any, **_: Any) -> None:
        seen.append(config)
        raise Reached

    def run(name: str, *overrides: str) -> Any:
        script = REPOSITORY / "launch" / f"{name}.py"
        monkeypatch.setattr("sys.argv", [str(script), *overrides])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Reached:
            return seen.pop()
        raise AssertionError("the command did not begin")

    monkeypatch.setattr(moe.train.run, "run", begin)
    monkeypatch.setattr(moe.data.prepare, "prepare", begin)
    # launch/train.py looks for the data first; this is about the configuration alone
    monkeypatch.setattr(moe.data.manifest, "read_manifest", lambda *_, **__: None)
    monkeypatch.syspath_prepend(str(REPOSITORY / "launch"))
    typed = importlib.import_module("typed")
    monkeypatch.setattr(typed, "refuse_other_data", lambda config, manifest: None)
    launchers = importlib.import_module("launchers.start")
    monkeypatch.setattr(launchers, "check_launch", lambda job: None)
    monkeypatch.setattr(launchers, "start", lambda job: begin(job.config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    return run


@pytest.fixture
def compose(command: Callable[..., Any]) -> Compose:
    def composed(*overrides: str) -> TrainConfig:
        config = command("train", *overrides)
        assert isinstance(config, TrainConfig)
        return config

    return composed


def test_the_folder_is_really_read() -> None:
    assert {"model=phi35_moe", "experiment=nano", "debug=overfit"} <= set(EVERY_OPTION)
    assert {"optim=adamw_wsd", "router=topk"} <= set(EVERY_OPTION)


@pytest.mark.parametrize("option", [o for o in EVERY_OPTION if o not in NOT_FOR_TRAINING])
def test_every_option_of_every_group_composes(option: str, compose: Compose) -> None:
    config = compose(option, *NEEDED.get(option, []))
    group, _, name = option.partition("=")
    if group == "model":
        assert config.model.name == name == config.name
    file = CONF / group / f"{name}.yaml"
    for key, value in values_of(file).items():
        path = key if is_global(file) else f"{group}.{key}"
        if path.startswith("hydra."):
            continue  # which runs a sweep makes, not what one is
        if option not in NEEDED or path != "data.sources":
            assert comparable(value_at(config, path)) == comparable(value), path


@pytest.mark.parametrize("option", ["data=python", "tokenizer=bpe_4096", "tokenizer=phi"])
def test_preparing_data_composes(option: str, command: Callable[..., Any]) -> None:
    config = command("prepare_data", option, "paths=data_only")
    assert isinstance(config, PrepareConfig)
    assert config.paths.data_dir == "data/python"


def test_without_overrides_the_defaults_are_those_of_the_dataclasses(compose: Compose) -> None:
    config = compose()
    assert config.paths.run_dir.startswith("runs/tiny_moe/")
    known = dataclasses.replace(config, paths=TrainConfig().paths)
    assert known == TrainConfig()


def test_an_experiment_changes_what_it_says_and_the_command_line_has_the_last_word(
    compose: Compose,
) -> None:
    config = compose("experiment=nano", "train.steps=7", "model=tiny_dense")
    assert (config.train.steps, config.train.batch_size) == (7, 8)
    assert config.model.name == "tiny_dense"
    assert config.logging.wandb == "disabled"


@pytest.mark.parametrize("name", options("model"))
def test_every_model_builds_and_has_the_parameters_that_its_configuration_counts(
    name: str, compose: Compose
) -> None:
    config = compose(f"model={name}").model
    model = build_model(config, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters()
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    used = experts * config.top_k // config.num_experts if config.is_sparse else experts
    assert config.num_parameters(active=True) == config.num_parameters() - experts + used


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("phi3_mini_4k", 3_821_079_552, 3_821_079_552),
        ("phi3_mini_128k", 3_821_079_552, 3_821_079_552),
        ("phi3_mini_128k_april", 3_821_079_552, 3_821_079_552),
        ("phi35_mini", 3_821_079_552, 3_821_079_552),
        ("phi3_small_8k", 7_392_272_384, 7_392_272_384),
        ("phi3_small_128k", 7_392_272_384, 7_392_272_384),
        ("phi3_medium_4k", 13_960_238_080, 13_960_238_080),
        ("phi3_medium_128k", 13_960_238_080, 13_960_238_080),
        ("phi35_moe", 41_873_153_344, 6_640_999_744),
        ("grin_moe", 41_873_153_344, 6_640_999_744),
    ],
)
def test_the_published_models_have_the_published_size(
    name: str, total: int, active: int, compose: Compose
) -> None:
    config = compose(f"model={name}").model
    assert (config.num_parameters(), config.num_parameters(active=True)) == (total, active)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_models_file_says_what_the_published_config_says(name: str, compose: Compose) -> None:
    ours = compose(f"model={name}").model
    published = load_hf_config(PUBLISHED_FOLDER / f"{name}.json").model
    if name in LISTS_NOT_PUBLISHED:  # nor are they in our file
        rope = dataclasses.replace(published.rope, short_factor=None, long_factor=None)
        if name == "phi3_small_128k":
            rope = dataclasses.replace(rope, long_mscale=1.0)
        published = dataclasses.replace(published, rope=rope)
        assert ours.usable_length == ours.rope.original_max_position
    if published.sliding_window is not None and published.sliding_window > published.max_position:
        published = dataclasses.replace(published, sliding_window=None)  # it has no effect
    assert ours == dataclasses.replace(published, name=name)


@pytest.mark.parametrize("name", FAMILY)
def test_a_tiny_model_has_the_features_of_the_large_one(name: str, compose: Compose) -> None:
    large = compose(f"model={name}").model
    tiny = compose(f"model={name}_tiny").model
    same = (
        "norm", "norm_eps", "attention_bias", "head_bias", "tie_embeddings", "feed_forward",
        "feed_forward_bias", "is_sparse", "num_experts", "embedding_multiplier", "logit_divisor",
        "embedding_dropout", "feed_forward_dropout", "gegelu_limit",
    )  # fmt: skip
    for key in same:
        assert getattr(tiny, key) == getattr(large, key), key
    assert tiny.num_heads // tiny.num_kv_heads == large.num_heads // large.num_kv_heads
    for model in (tiny, large):  # muP, or the usual scale
        if model.feed_forward == "gegelu":
            assert model.attention_scale == 1 / model.head_dim
        else:
            assert model.attention_scale is None
    assert bool(tiny.masked_tokens) == bool(large.masked_tokens)
    assert (tiny.sliding_window is None) == (large.sliding_window is None)
    assert 100_000 < tiny.num_parameters() < 500_000
    # what differs by position differs within the 256 tokens of a training window
    seq_len = 256
    assert tiny.usable_length >= seq_len
    if large.max_position > large.rope.original_max_position:
        assert tiny.rope.original_max_position < seq_len
        assert tiny.rope.short_factor != tiny.rope.long_factor
    if tiny.sliding_window is not None:
        assert tiny.sliding_window < seq_len
    sparse = tiny.block_sparse
    assert [sparse.is_sparse_layer(i) for i in range(2)] == [
        large.block_sparse.is_sparse_layer(i) for i in range(2)
    ]
    if sparse.num_local_blocks:
        assert sparse.num_local_blocks * sparse.block_size * 2 < seq_len
        assert not sparse.is_same_for_all_heads


def test_the_default_model_is_as_large_as_the_readme_promises(compose: Compose) -> None:
    model: ModelConfig = compose().model
    assert model.num_parameters() >= 20_000_000
    assert (model.num_experts, model.top_k) == (16, 2)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.stem)
def test_no_file_names_code_to_be_called(path: Path) -> None:
    assert "_target_" not in path.read_text()


@pytest.mark.parametrize(
    "file",
    [path for group in ("experiment", "debug") for path in sorted((CONF / group).glob("*.yaml"))],
    ids=lambda path: path.stem,
)
def test_a_preset_does_not_repeat_a_default(file: Path) -> None:
    # the other groups' files may: an option says what it is, a model gives its whole shape
    for key, value in values_of(file).items():
        assert comparable(value_at(TrainConfig(), key)) != comparable(value), key


def values_of(path: Path) -> dict[str, Any]:
    """Dotted keys and values that a file sets, without its defaults list."""
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    content.pop("defaults", None)
    return dict(_flat(content, ""))


def _flat(content: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif "${" not in str(value):
            yield f"{prefix}{key}", value


def is_global(path: Path) -> bool:
    return "@package _global_" in path.read_text()


def value_at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


def comparable(value: Any) -> Any:
    """A list as a tuple, which is what the dataclasses hold."""
    return tuple(value) if isinstance(value, list) else value
