"""The routing kernels, as ops, against formulas in Python floats and against the reference."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import phi_kernels
import pytest
import torch
from expert_cases import TOLERANCE, distance
from phi_kernels import reference
from torch import Tensor

OPS = torch.ops.phi_kernels
THRESHOLD = 0.01

# tokens and experts; a program takes 1024 / padded experts tokens
EDGES = {
    "one token": (1, 16),
    "no token": (0, 16),
    "two experts, so that both are chosen": (7, 2),
    "one token less than a block": (63, 16),
    "exactly a block": (64, 16),
    "one token more than a block": (65, 16),
    "experts that are no power of two, several blocks": (75, 20),
    "many experts": (9, 128),
    "more experts than a block has numbers": (3, 1500),
}


class Draws(NamedTuple):
    sample_TKE: Tensor
    heun_TK: Tensor


def close_logits(edge: str) -> Tensor:
    """Logits of which about half lie within the 2 % threshold, of either sign; no exact ties."""
    num_tokens, num_experts = EDGES[edge]
    generator = torch.Generator().manual_seed(num_tokens)
    base = 2 * torch.randn(num_tokens, 1, generator=generator)
    spread = 0.1 * torch.rand(num_tokens, 1, generator=generator)
    return base * (1 + spread * torch.randn(num_tokens, num_experts, generator=generator))


def draw_uniforms(edge: str) -> Draws:
    """As moe/sparse/noise.py: odd multiples of 2^-24."""
    num_tokens, num_experts = EDGES[edge]
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(2**23, (num_tokens, 2, num_experts), generator=generator)
    heun_TK = torch.rand(num_tokens, 2, generator=generator)
    return Draws((whole.float() + 0.5) * 2.0**-23, heun_TK)


def upstream(num_tokens: int, top_k: int) -> Tensor:
    return torch.randn(num_tokens, top_k, generator=torch.Generator().manual_seed(2))


def sparsemixer_by_kernel(logit_TE, draws: Draws | None):
    sample_TKE, heun_TK = draws or (None, None)
    return OPS.sparsemixer(logit_TE, THRESHOLD, sample_TKE, heun_TK)


class Formula(NamedTuple):
    """One token's choices by the published rules, in Python floats."""

    experts: list[int]
    weights: list[float]
    gradient: list[float]
    is_near: bool  # float32 may decide otherwise: a score at the threshold, or two draws as good


def sparsemixer_formula(scores, grads, sample=None, heun=None) -> Formula:
    experts, weights, gradient, is_near = [], [], [0.0] * len(scores), False
    for k in range(2):
        allowed = [j for j in range(len(scores)) if j not in experts]
        best = max(allowed, key=lambda j: scores[j])
        top = scores[best]
        ratio = {j: (top - scores[j]) / max(abs(scores[j]), top) for j in allowed}
        survivors = [j for j in allowed if not ratio[j] > 2 * THRESHOLD]
        is_near |= any(abs(ratio[j] - 2 * THRESHOLD) < 1e-6 for j in allowed)
        power = {j: math.exp(scores[j] - top) for j in survivors}
        p = {j: power[j] / sum(power.values()) for j in survivors}
        expert, scale = best, 1.0
        if sample is not None:
            noisy = {j: scores[j] - math.log(-math.log(sample[k][j])) for j in survivors}
            expert, *others = sorted(survivors, key=lambda j: -noisy[j])
            is_near |= bool(others) and noisy[expert] - noisy[others[0]] < 1e-5
            scale = 1.0 if expert == best or heun[k] > 0.75 else 0.3333
        experts.append(expert)
        weights.append(scale * p[expert])
        for j in survivors:
            gradient[j] += grads[k] * p[expert] * ((j == expert) - p[j])
    return Formula(experts, weights, gradient, is_near)


def top_k_formula(scores, grads, top_k: int, renormalise: bool) -> Formula:
    power = [math.exp(s - max(scores)) for s in scores]
    p = [w / sum(power) for w in power]
    order = sorted(range(len(scores)), key=lambda j: -p[j])
    experts, left = order[:top_k], order[top_k : top_k + 1]
    if renormalise:
        total = sum(p[j] for j in experts)
        p = [p[j] / total if j in experts else 0.0 for j in range(len(scores))]
    dot = sum(g * p[j] for g, j in zip(grads, experts, strict=True))
    gradient = [-p_j * dot for p_j in p]
    for g, j in zip(grads, experts, strict=True):
        gradient[j] += g * p[j]
    ranked = [scores[j] for j in experts + left]
    is_near = any(a - b < 1e-6 for a, b in itertools.pairwise(ranked))
    return Formula(experts, [p[j] for j in experts], gradient, is_near)


def assert_agrees(weight_TK, expert_TK, grad_TE, formulas: list[Formula]) -> None:
    """Every token that float32 can decide; of those all answers."""
    kept = [t for t, formula in enumerate(formulas) if not formula.is_near]
    assert len(kept) >= 0.95 * len(formulas)
    assert expert_TK[kept].tolist() == [formulas[t].experts for t in kept]
    for got, name in ((weight_TK, "weights"), (grad_TE, "gradient")):
        exact = torch.tensor([getattr(formulas[t], name) for t in kept], dtype=torch.float64)
        assert distance(got[kept], exact.view(got[kept].shape)) < TOLERANCE[torch.float32], name


@pytest.mark.parametrize("is_sampled", [False, True], ids=["largest", "sampled"])
@pytest.mark.parametrize("edge", EDGES)
def test_sparsemixer_agrees_with_the_formula_and_its_gradient(edge, is_sampled, poisoned):
    logit_TE = close_logits(edge).requires_grad_()
    draws = draw_uniforms(edge) if is_sampled else None
    weight_TK, expert_TK, count_E = sparsemixer_by_kernel(logit_TE, draws)
    grad_TK = upstream(len(logit_TE), 2)
    (grad_TE,) = torch.autograd.grad(weight_TK, logit_TE, grad_TK)
    formulas = [
        sparsemixer_formula(
            scores,
            grad_TK[t].tolist(),
            *([] if draws is None else [draws.sample_TKE[t].tolist(), draws.heun_TK[t].tolist()]),
        )
        for t, scores in enumerate(logit_TE.tolist())
    ]
    assert_agrees(weight_TK, expert_TK, grad_TE, formulas)
    assert (weight_TK.dtype, expert_TK.dtype) == (torch.float32, torch.int64)
    assert torch.equal(count_E, torch.bincount(expert_TK.flatten(), minlength=logit_TE.shape[1]))
    assert not expert_TK.requires_grad
    assert not count_E.requires_grad


def test_the_logits_of_these_tests_reach_every_branch():
    edge = "experts that are no power of two, several blocks"
    logit_TE, draws = close_logits(edge), draw_uniforms(edge)
    largest = sparsemixer_by_kernel(logit_TE, None)
    sampled = sparsemixer_by_kernel(logit_TE, draws)
    is_other = largest[1] != sampled[1]
    assert 0.2 < (largest[0] == 1).float().mean() < 0.8  # alone, and beside other survivors
    assert 0.2 < is_other.float().mean() < 0.8
    assert ((draws.heun_TK > 0.75) & is_other).sum() > 5  # the full weight of another choice
    assert (logit_TE < 0).any(dim=1).sum() > 20
    assert (logit_TE > 0).any(dim=1).sum() > 20


@pytest.mark.parametrize("edge", EDGES)
def test_experts_differ_from_the_references_only_between_equal_draws(edge):
    logit_TE, draws = close_logits(edge), draw_uniforms(edge)
    _, ours_TK, _ = sparsemixer_by_kernel(logit_TE, draws)
    expected = reference.sparsemixer(
        logit_TE, threshold=THRESHOLD, sample_TKE=draws.sample_TKE, heun_TK=draws.heun_TK
    )
    noisy_TKE = logit_TE[:, None] - (-draws.sample_TKE.log()).log()
    ours_noisy_TK, expected_noisy_TK = (
        noisy_TKE.gather(2, expert_TK[:, :, None]).squeeze(2)
        for expert_TK in (ours_TK, expected[1])
    )
    # logarithms of two implementations: a few units of the last place; the threshold, by IEEE
    # division of the same numbers, is decided alike. After a first choice that differs the second
    # is another draw
    agrees_T = (ours_TK[:, 0] == expected[1][:, 0]).long()
    gap_TK = (ours_noisy_TK - expected_noisy_TK).abs()
    allowed_TK = 8 * 2.0**-24 * noisy_TKE.abs().amax(dim=2)
    is_fine_TK = (ours_TK == expected[1]) | (gap_TK <= allowed_TK)
    assert is_fine_TK[:, 0].all()
    assert is_fine_TK[agrees_T.bool(), 1].all()
    assert (ours_TK == expected[1]).float().mean() > 0.99 if len(logit_TE) else True


# tokens, experts, choices
TOP_K_EDGES = {
    "one token": (1, 16, 2),
    "no token": (0, 16, 2),
    "one expert": (5, 1, 1),
    "k = 1": (20, 6, 1),
    "k = e": (6, 4, 4),
    "k and e no powers of two": (70, 20, 3),
    "one token more than a block": (65, 16, 2),
    "many experts and choices": (9, 128, 8),
    "more experts than a block has numbers": (3, 1500, 2),
}


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("edge", TOP_K_EDGES)
def test_top_k_softmax_agrees_with_the_formula_and_its_gradient(edge, renormalise, poisoned):
    num_tokens, num_experts, top_k = TOP_K_EDGES[edge]
    generator = torch.Generator().manual_seed(4)
    logit_TE = torch.randn(num_tokens, num_experts, generator=generator).requires_grad_()
    weight_TK, expert_TK, count_E = OPS.top_k_softmax(logit_TE, top_k, renormalise)
    grad_TK = upstream(num_tokens, top_k)
    (grad_TE,) = torch.autograd.grad(weight_TK, logit_TE, grad_TK)
    formulas = [
        top_k_formula(scores, grad_TK[t].tolist(), top_k, renormalise)
        for t, scores in enumerate(logit_TE.tolist())
    ]
    if renormalise and top_k == 1:
        assert torch.equal(weight_TK, torch.ones(num_tokens, 1))
        assert torch.equal(grad_TE, torch.zeros(num_tokens, num_experts))
    else:
        assert_agrees(weight_TK, expert_TK, grad_TE, formulas)
    assert (weight_TK.dtype, expert_TK.dtype) == (torch.float32, torch.int64)
    assert torch.equal(count_E, torch.bincount(expert_TK.flatten(), minlength=num_experts))
    assert not expert_TK.requires_grad
    assert not count_E.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_logits_are_used_in_float32(dtype):
    edge = "exactly a block"
    logit_TE, draws = close_logits(edge).to(dtype), draw_uniforms(edge)
    grad_TK = upstream(len(logit_TE), 2)
    for run in (
        lambda logit_TE: sparsemixer_by_kernel(logit_TE, draws),
        lambda logit_TE: OPS.top_k_softmax(logit_TE, 2, True),
    ):
        short_TE = logit_TE.clone().requires_grad_()
        long_TE = logit_TE.float().requires_grad_()
        short, long = run(short_TE), run(long_TE)
        assert all(torch.equal(a, b) for a, b in zip(short, long, strict=True))
        short[0].backward(grad_TK)
        long[0].backward(grad_TK)
        assert short_TE.grad.dtype == dtype
        assert distance(short_TE.grad, long_TE.grad) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # numpy's, of 0 / 0
def test_equal_scores_take_the_lower_expert_and_zeros_survive():
    for value in (0.0, 1.0, -1.0):
        logit_TE = torch.full((3, 5), value)
        weight_TK, expert_TK, count_E = sparsemixer_by_kernel(logit_TE, None)
        assert expert_TK.tolist() == [[0, 1]] * 3
        assert weight_TK[0].tolist() == pytest.approx([1 / 5, 1 / 4])
        assert count_E.tolist() == [3, 3, 0, 0, 0]
        weight_TK, expert_TK, _ = OPS.top_k_softmax(logit_TE, 3, False)
        assert expert_TK.tolist() == [[0, 1, 2]] * 3
        assert weight_TK[0].tolist() == pytest.approx([1 / 5] * 3)


def test_probabilities_that_are_zero_are_chosen_in_order_as_by_the_reference():
    logit_TE = torch.tensor([[-300.0, 0.0, -200.0, -250.0]])
    _, expert_TK, _ = OPS.top_k_softmax(logit_TE, 3, False)
    assert expert_TK.tolist() == [[1, 0, 2]]
    assert torch.equal(expert_TK, reference.top_k_softmax(logit_TE, top_k=3, renormalise=False)[1])


def test_a_lone_survivor_has_weight_one_exactly():
    weight_TK, expert_TK, _ = sparsemixer_by_kernel(torch.tensor([[3.0, 1.0, 2.0, -4.0]]), None)
    assert expert_TK.tolist() == [[0, 2]]
    assert weight_TK.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("is_sampled", [False, True], ids=["largest", "sampled"])
def test_nan_logits_give_nan_weights_and_experts_that_exist(is_sampled):
    logit_TE, draws = close_logits("many experts"), draw_uniforms("many experts")
    logit_TE[2, 100] = logit_TE[2, 5] = float("nan")
    logit_TE[4] = float("nan")
    used = draws if is_sampled else None
    made = sparsemixer_by_kernel(logit_TE, used)
    expected = reference.sparsemixer(
        logit_TE,
        threshold=THRESHOLD,
        sample_TKE=draws.sample_TKE if is_sampled else None,
        heun_TK=draws.heun_TK if is_sampled else None,
    )
    is_nan_T = torch.isin(torch.arange(9), torch.tensor([2, 4]))
    assert made[0].isnan().any(dim=1).equal(is_nan_T)
    assert torch.equal(made[0].isnan(), expected[0].isnan())
    assert torch.equal(made[1], expected[1])
    assert torch.equal(made[2], expected[2])
    by_kernel = OPS.top_k_softmax(logit_TE, 3, True)
    by_reference = reference.top_k_softmax(logit_TE, top_k=3, renormalise=True)
    assert torch.equal(by_kernel[0].isnan(), by_reference[0].isnan())
    assert torch.equal(by_kernel[1], by_reference[1])


def test_two_runs_are_bitwise_equal_and_a_permuted_batch_gives_permuted_answers():
    edge = "experts that are no power of two, several blocks"
    logit_TE, draws, grad_TK = close_logits(edge), draw_uniforms(edge), upstream(75, 2)
    order_T = torch.randperm(75, generator=torch.Generator().manual_seed(0))

    def run(logit_TE, draws, grad_TK):
        logit_TE = logit_TE.clone().requires_grad_()
        mixed = sparsemixer_by_kernel(logit_TE, draws)
        best = OPS.top_k_softmax(logit_TE, 2, True)
        total = ((mixed[0] + best[0]) * grad_TK).sum()
        (grad_TE,) = torch.autograd.grad(total, logit_TE)
        return (*mixed[:2], *best[:2], grad_TE), (mixed[2], best[2])

    once, twice = run(logit_TE, draws, grad_TK), run(logit_TE, draws, grad_TK)
    of_tokens, counts = run(
        logit_TE[order_T], Draws(*(d[order_T] for d in draws)), grad_TK[order_T]
    )
    for a, b, c in zip(once[0], twice[0], of_tokens, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[order_T], c)
    for a, b, c in zip(once[1], twice[1], counts, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_strided_inputs_are_read_right():
    edge = "exactly a block"
    logit_TE, draws, grad_TK = close_logits(edge), draw_uniforms(edge), upstream(64, 2)

    def run(strided):
        inputs = logit_TE, draws.sample_TKE, draws.heun_TK, grad_TK
        logit, sample, heun, grad = (
            t.transpose(0, -1).contiguous().transpose(0, -1) if strided else t for t in inputs
        )
        logit = logit.detach().requires_grad_()
        weight_TK, expert_TK, _ = OPS.sparsemixer(logit, THRESHOLD, sample, heun)
        return weight_TK, expert_TK, *torch.autograd.grad(weight_TK, logit, grad)

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False), strict=True))


def test_public_functions_on_a_cpu_are_the_reference():
    logit_TE = close_logits("exactly a block").double()
    ours = phi_kernels.sparsemixer(logit_TE, threshold=THRESHOLD)
    expected = reference.sparsemixer(logit_TE, threshold=THRESHOLD)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    ours = phi_kernels.top_k_softmax(logit_TE, top_k=3, renormalise=True)
    expected = reference.top_k_softmax(logit_TE, top_k=3, renormalise=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert ours[0].dtype == torch.float64


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="top_k is 5; with 4 experts it is 1 to that many"):
        phi_kernels.top_k_softmax(torch.zeros(3, 4), top_k=5, renormalise=True)
    with pytest.raises(ValueError, match="chooses 2 experts and got logits of 1"):
        phi_kernels.sparsemixer(torch.zeros(3, 1), threshold=THRESHOLD)


def test_the_ops_follow_the_rules_of_torch_library():
    edge = "two experts, so that both are chosen"
    logit_TE, draws = close_logits(edge).requires_grad_(), draw_uniforms(edge)
    expert_TK = sparsemixer_by_kernel(logit_TE, draws)[1]
    grad_TK, constant_TE = upstream(7, 2), logit_TE.detach()
    opcheck = torch.library.opcheck
    opcheck(OPS.sparsemixer, (logit_TE, THRESHOLD, None, None))
    opcheck(OPS.sparsemixer, (logit_TE, THRESHOLD, *draws))
    opcheck(OPS.sparsemixer_backward, (grad_TK, constant_TE, expert_TK, THRESHOLD))
    opcheck(OPS.top_k_softmax, (logit_TE, 2, True))
    opcheck(OPS.top_k_softmax_backward, (grad_TK, constant_TE, expert_TK, True))


@pytest.mark.parametrize("name", ["sparsemixer", "top_k_softmax"])
def test_the_ops_are_traced_into_one_graph_with_their_gradients(name):
    draws = draw_uniforms("exactly a block")

    def weights(logit_TE):
        if name == "sparsemixer":
            made = sparsemixer_by_kernel(2 * logit_TE, draws)
        else:
            made = OPS.top_k_softmax(2 * logit_TE, 2, True)
        return made[0].square(), made[1], made[2]

    compiled = torch.compile(weights, fullgraph=True, backend="aot_eager")
    logit_TE = close_logits("exactly a block").requires_grad_()
    answers = []
    for run in (weights, compiled):
        made = run(logit_TE)
        answers.append((*made, *torch.autograd.grad(made[0].sum(), logit_TE)))
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
