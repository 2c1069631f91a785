"""What both engines share: clipping, the refusal of steps, and who may be asked for what."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import nn

from moe.config import OptimConfig, ParallelConfig
from moe.errors import ConfigError, UserError
from moe.parallel.deepspeed_engine import _give_address_if_alone
from moe.parallel.engine import clip_gradients, make_engine, set_learning_rate
from moe.parallel.processes import Processes
from moe.train.optim import make_optimizer

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    """A (1, 2) weight with gradient (3, 4) and a bias with gradient 12: the norm is 13."""
    layer = nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    layer.bias.grad = torch.tensor([12.0])
    return make_optimizer(layer, OptimConfig())


def gradients(optimizer: torch.optim.Optimizer) -> list[float]:
    listed = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return [value for gradient in listed for value in gradient.flatten().tolist()]


def test_the_norm_is_over_all_groups_and_clipping_scales_them_alike(optimizer) -> None:
    assert clip_gradients(optimizer, max_norm=1.3) == pytest.approx(13.0)
    assert gradients(optimizer) == pytest.approx([0.3, 0.4, 1.2])


@pytest.mark.parametrize("max_norm", [0.0, 13.1, 1e9])
def test_no_limit_and_a_limit_above_the_norm_change_nothing(optimizer, max_norm: float) -> None:
    assert clip_gradients(optimizer, max_norm=max_norm) == pytest.approx(13.0)
    assert gradients(optimizer) == [3.0, 4.0, 12.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_returned_and_spoils_no_other_gradient(
    optimizer, value: float
) -> None:
    optimizer.param_groups[0]["params"][0].grad[0, 0] = value
    assert not math.isfinite(clip_gradients(optimizer, max_norm=1.0))
    assert gradients(optimizer)[1:] == [4.0, 12.0]


def test_parameters_without_a_gradient_are_left_out(optimizer) -> None:
    optimizer.param_groups[1]["params"][0].grad = None
    assert clip_gradients(optimizer, max_norm=0.0) == pytest.approx(5.0)


def test_every_group_gets_the_rate_of_the_step(optimizer) -> None:
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_a_skipped_step_changes_neither_rate_nor_weights_and_clears_gradients() -> None:
    layer = nn.Linear(2, 1)
    engine = make_engine(layer, OptimConfig(lr=0.5), ParallelConfig(engine="plain"), ALONE)
    before = layer.weight.detach().clone()
    engine.backward(layer(torch.full((1, 2), math.inf)).sum(), is_last=True)
    assert not math.isfinite(engine.step(lr=0.1))
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None
    assert engine.optimizer.param_groups[0]["lr"] == 0.5
    engine.backward(layer(torch.ones(1, 2)).sum(), is_last=True)
    assert engine.step(lr=0.1) == pytest.approx(math.sqrt(3))
    assert not torch.equal(layer.weight, before)


def test_the_plain_engine_refuses_several_processes() -> None:
    several = Processes(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"parallel.engine: got 'plain' with 2 processes"):
        make_engine(nn.Linear(1, 1), OptimConfig(), ParallelConfig(engine="plain"), several)


def test_without_deepspeed_the_message_names_the_package_and_the_other_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(UserError, match=r"pip install 'phimoe\[train\]', or use parallel=plain"):
        make_engine(nn.Linear(1, 1), OptimConfig(), ParallelConfig(), ALONE)


def test_an_accelerator_that_this_rank_does_not_have_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(ConfigError, match=r"DS_ACCELERATOR: got 'cuda', .* Unset it"):
        make_engine(nn.Linear(1, 1), OptimConfig(), ParallelConfig(), ALONE)


@pytest.mark.parametrize(
    "left", [{}, {"MASTER_ADDR": "192.0.2.1"}, {"MASTER_PORT": "1"}, {"WORLD_SIZE": "1"},
             {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "WORLD_SIZE": "1", "RANK": "0"}],
)  # fmt: skip
def test_a_process_alone_meets_nobody_whatever_a_launcher_left_behind(
    left: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = dict(left)
    monkeypatch.setattr(os, "environ", environment)
    _give_address_if_alone(ALONE)
    assert environment == {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }  # fmt: skip


def test_a_launcher_of_one_process_is_met_where_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }  # fmt: skip
    monkeypatch.setattr(os, "environ", dict(said))
    _give_address_if_alone(ALONE)
    assert os.environ == said
