"""Balance and z losses against hand-written float64 oracles, with padding."""

from __future__ import annotations

import math

import phi_kernels
import pytest
import torch

from moe.sparse.losses import load_balance, load_balance_pooled, z_loss
from moe.sparse.router import Routing

NUM_TOKENS, NUM_EXPERTS = 60, 16


def routing_of(seed):
    generator = torch.Generator().manual_seed(seed)
    logit_TE = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator, dtype=torch.float64)
    sample = torch.rand(NUM_TOKENS, 2, NUM_EXPERTS, generator=generator, dtype=torch.float64)
    heun = torch.rand(NUM_TOKENS, 2, generator=generator, dtype=torch.float64)
    weight_TK, expert_TK, _ = phi_kernels.sparsemixer(
        logit_TE.requires_grad_(), threshold=0.2, sample_TKE=sample, heun_TK=heun
    )
    return routing_with(weight_TK, expert_TK, logit_TE)


def routing_with(weight_TK, expert_TK, logit_TE):
    count_E = torch.bincount(expert_TK.flatten(), minlength=NUM_EXPERTS)
    return Routing(weight_TK, expert_TK, logit_TE, count_E)


def softmax(row):
    powers = [math.exp(value - max(row)) for value in row]
    return [p / sum(powers) for p in powers]


def oracle(logits, choices, valid):
    """E * sum_e f_e P_e with Python floats over the valid tokens."""
    hits, mass = [0.0] * NUM_EXPERTS, [0.0] * NUM_EXPERTS
    for row, experts, is_valid in zip(logits, choices, valid, strict=True):
        if is_valid:
            for e in experts:
                hits[e] += 1
            mass = [m + p for m, p in zip(mass, softmax(row), strict=True)]
    num = sum(valid)
    return NUM_EXPERTS * sum(h / num * m / num for h, m in zip(hits, mass, strict=True))


@pytest.fixture
def valid_T():
    return torch.arange(NUM_TOKENS) % 3 != 1  # a third of the tokens is padding


def test_balance_agrees_with_the_oracle_on_the_experts_really_used(valid_T):
    routing = routing_of(0)
    expected = oracle(routing.logit_TE.tolist(), routing.expert_TK.tolist(), valid_T.tolist())
    assert load_balance(routing, valid_T).item() == pytest.approx(expected, rel=1e-12)


def test_pooled_balance_agrees_with_the_oracle_on_plain_top_k(valid_T):
    routings = [routing_of(seed) for seed in (1, 2, 3)]
    logits = [row for r in routings for row in r.logit_TE.tolist()]
    choices = [sorted(range(NUM_EXPERTS), key=lambda e: -row[e])[:2] for row in logits]
    expected = oracle(logits, choices, valid_T.tolist() * 3)
    assert load_balance_pooled(routings, valid_T).item() == pytest.approx(expected, rel=1e-12)


def test_z_loss_agrees_with_the_oracle(valid_T):
    routing = routing_of(4)
    squares = [
        math.log(sum(math.exp(v) for v in row)) ** 2
        for row, is_valid in zip(routing.logit_TE.tolist(), valid_T.tolist(), strict=True)
        if is_valid
    ]
    assert z_loss(routing, valid_T).item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)


@pytest.mark.parametrize("loss", [load_balance, lambda r, v: load_balance_pooled([r], v), z_loss])
def test_padding_changes_neither_value_nor_gradient(loss, valid_T):
    routing = routing_of(5)
    value = loss(routing, valid_T)
    (gradient,) = torch.autograd.grad(value, routing.logit_TE, retain_graph=True)
    assert gradient[~valid_T].abs().max() == 0
    assert gradient[valid_T].abs().max() > 0
    cut = routing_with(
        routing.weight_TK[valid_T], routing.expert_TK[valid_T], routing.logit_TE[valid_T].detach()
    )
    assert loss(cut, None).item() == pytest.approx(value.item(), rel=1e-12)


def test_the_gradient_flows_through_the_probabilities_only(valid_T):
    routing = routing_of(6)
    logit_TE = routing.logit_TE.detach().requires_grad_()

    def value(logit_TE):
        return load_balance(
            routing_with(routing.weight_TK.detach(), routing.expert_TK, logit_TE), valid_T
        )

    assert torch.autograd.gradcheck(value, logit_TE)


def test_perfect_balance_is_k():
    expert_TK = torch.stack([torch.arange(16), (torch.arange(16) + 1) % 16], dim=1)
    routing = routing_with(torch.ones(16, 2), expert_TK, torch.zeros(16, 16))
    assert load_balance(routing).item() == pytest.approx(2.0)


def test_the_mean_over_ranks_of_the_global_loss_is_the_loss_of_all_tokens():
    """Uneven ranks: 1, 20 and 39 tokens; summed by hand here, by gloo in test_data_parallel."""
    routing = routing_of(7)
    parts = [routing_with(*(t[a:b] for t in routing[:3])) for a, b in ((0, 1), (1, 21), (21, 60))]
    exchanged = []
    for part in parts:
        load_balance(part, reduce=lambda totals: exchanged.append(totals) or totals)
    together = torch.stack(exchanged).sum(dim=0).detach()
    values = [load_balance(part, reduce=lambda totals: together) for part in parts]
    assert (sum(values) / 3).item() == pytest.approx(load_balance(routing).item(), rel=1e-12)
    (whole,) = torch.autograd.grad(load_balance(routing), routing.logit_TE, retain_graph=True)
    (split,) = torch.autograd.grad(sum(values) / 3, routing.logit_TE)
    assert torch.allclose(whole, split, rtol=1e-10, atol=1e-15)
