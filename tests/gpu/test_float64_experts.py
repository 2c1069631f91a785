"""The float64 arithmetic that a GPU is held to is the reference's; runs without a GPU."""

from __future__ import annotations

import float64_experts
import pytest
import torch
from expert_cases import CASES, answers, make_inputs
from layer_on_device import Problem
from phi_kernels import reference


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_references_value_and_derivatives(name, monkeypatch):
    monkeypatch.setattr(float64_experts, "_ROWS", 7)  # several pieces of an expert
    inputs = make_inputs(CASES[name], torch.float64)
    problem = Problem(*inputs)
    found = float64_experts.errors(problem, answers(reference.expert_mlp, inputs))
    assert found.keys() == {"y", "x", "weight", "gate_up", "down"}
    assert max(found.values()) < 1e-14


@pytest.mark.parametrize("wrong", ["y", "x", "weight", "gate_up", "down"])
def test_one_wrong_element_of_any_answer_is_found(wrong):
    inputs = make_inputs(CASES["first and last expert empty"], torch.float64)
    got = {
        key: value.contiguous().clone()
        for key, value in answers(reference.expert_mlp, inputs).items()
    }
    got[wrong].view(-1)[-1] += 0.1 * got[wrong].norm()
    found = float64_experts.errors(Problem(*inputs), got)
    assert [key for key, value in found.items() if value > 1e-3] == [wrong]
    got[wrong].view(-1)[0] = float("nan")
    assert float64_experts.errors(Problem(*inputs), got)[wrong] == float("inf")
