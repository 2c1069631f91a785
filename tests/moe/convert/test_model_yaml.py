"""A model written as YAML is the same model when it is read again, to the last bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from moe.config import RouterConfig
from moe.config_from_dict import from_dict
from moe.convert.hf_config import load_hf_config
from moe.convert.model_yaml import model_yaml, router_overrides
from moe.model_config import ModelConfig, RopeConfig

ROOT = Path(__file__).parents[3]
PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.json"))
OURS = sorted((ROOT / "conf/model").glob("*.yaml"))


def read(text: str) -> ModelConfig:
    values: Any = OmegaConf.to_container(OmegaConf.create(text))
    return from_dict(ModelConfig, values)


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_model_keeps_every_number(file: Path) -> None:
    found = load_hf_config(file)
    text = model_yaml(found.model, found.router, name="mine", source=f"From {file.name}")
    assert read(text) == dataclasses.replace(found.model, name="mine")
    assert text.startswith(f"# From {file.name}: ")
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("file", OURS, ids=lambda path: path.stem)
def test_every_model_of_ours_does(file: Path) -> None:
    model = read(file.read_text())
    assert read(model_yaml(model, RouterConfig(), name=model.name, source="ours")) == model


@pytest.mark.parametrize("number", [1e-05, 1e16, 1.5e-7, 1 / 3, 12345678.9, 1e22, 5e-324])
def test_numbers_keep_every_bit(number: float) -> None:
    rope = RopeConfig(theta=number, short_factor=(number,) * 32, long_factor=(0.1 + 0.2,) * 32)
    model = ModelConfig(norm_eps=number, rope=rope)
    text = model_yaml(model, RouterConfig(), name=model.name, source="a test")
    assert read(text) == model
    # other readers of YAML 1.1 take a number without a point for text
    assert all("." in line for line in text.splitlines() if "theta" in line or "eps" in line)


@pytest.mark.parametrize("name", ["null", "on", "No", "3", "1e5", "a-b.c", "phi3_mini"])
def test_a_name_stays_text(name: str) -> None:
    text = model_yaml(ModelConfig(), RouterConfig(), name=name, source="line 1\nname: evil")
    assert read(text).name == name
    assert "\nname: evil" not in text


def test_the_router_is_said_in_a_comment_as_overrides() -> None:
    found = load_hf_config(PUBLISHED[0].with_name("phi35_moe.json"))
    overrides = router_overrides(found.router)
    assert overrides == ["router.balance_coef=0.0", "router.balance=pooled"]
    text = model_yaml(found.model, found.router, name="mine", source="x")
    assert f"#   {' '.join(overrides)}" in text
    assert router_overrides(RouterConfig()) == ["router=sparsemixer"]
