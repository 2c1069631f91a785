"""Step time and MFU: arithmetic that can be done by hand, and what must make a step slower."""

from __future__ import annotations

import dataclasses

import pytest

from moe.plan.times import implied_mfu, step_mfu, step_time
from moe.plan_config import ClusterConfig
from moe.train.throughput import model_flops_per_token

H100 = ClusterConfig()


def test_the_model_card_implies_a_fifth_of_the_peak(phi35_moe):
    # 4.9e12 tokens in 23 days on 512 GPUs: 4,816 tokens/s a GPU, of 42.3 GFLOP each
    per_token = model_flops_per_token(phi35_moe, 4096)
    assert per_token == pytest.approx(42.27e9, rel=1e-3)
    mfu = implied_mfu(per_token, tokens=4.9e12, days=23, num_gpus=512, peak_flops=989.4e12)
    assert mfu == pytest.approx(4_816 * 42.27e9 / 989.4e12, rel=1e-3)
    assert 0.20 < mfu < 0.21


def test_a_cluster_without_limits_reaches_the_peak(on_512):
    free = dataclasses.replace(
        H100, dense_fraction=1.0, experts_fraction=1.0, attention_fraction=1.0,
        memory_gb_per_second=1e12, node_gb_per_second=1e12, network_gb_per_second=1e12,
    )  # fmt: skip
    layout = dataclasses.replace(on_512, activation_checkpointing=False)
    assert step_mfu(step_time(layout, free), world_size=512) == pytest.approx(1.0, rel=1e-6)
    # recomputation does not count as useful
    assert step_mfu(step_time(on_512, free), world_size=512) < 0.78


@pytest.mark.parametrize(
    "rate",
    ["dense_fraction", "experts_fraction", "attention_fraction", "memory_gb_per_second",
     "node_gb_per_second", "network_gb_per_second"],
)  # fmt: skip
def test_half_of_any_rate_makes_the_step_longer(on_512, rate):
    slower = dataclasses.replace(H100, **{rate: getattr(H100, rate) / 2})
    assert step_time(on_512, slower).seconds > step_time(on_512, H100).seconds


def test_only_zero_3_hides_communication(on_512):
    assert step_time(on_512, H100).hidden == 0.0
    three = step_time(dataclasses.replace(on_512, zero_stage=3), H100)
    assert three.hidden > 0.0
    far = dataclasses.replace(H100, network_gb_per_second=0.5)
    exposed = step_time(dataclasses.replace(on_512, zero_stage=3), far)
    assert exposed.parts["ZeRO 3, beyond what the products hide"] > 10 * three.seconds


def test_the_products_of_recomputation_take_a_third_longer(on_512):
    def experts(checkpointing: bool, recompute: bool) -> float:
        layout = dataclasses.replace(
            on_512,
            activation_checkpointing=checkpointing,
            experts=dataclasses.replace(on_512.experts, recompute=recompute),
        )
        return step_time(layout, H100).parts["experts' products"]

    once = experts(False, False)
    assert experts(True, False) == pytest.approx(once * 4 / 3)
    assert experts(False, True) == pytest.approx(once * 11 / 9)
