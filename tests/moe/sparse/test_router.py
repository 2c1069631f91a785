"""The routers against the written formulas: float64 loops that share no code with the package."""

from __future__ import annotations

import math

import phi_kernels
import pytest
import torch

from moe.config import RouterConfig
from moe.model_config import ModelConfig
from moe.sparse.noise import token_keys
from moe.sparse.router import ROUTERS, Routing

EPS = 0.01


def sparsemixer(logit_TE, **settings):
    weight_TK, expert_TK, count_E = phi_kernels.sparsemixer(logit_TE, **settings)
    return Routing(weight_TK, expert_TK, logit_TE, count_E)


def formula(scores, *, sample=None, heun=None, eps=EPS):
    """SparseMixer-v2 for one token with Python floats: [(expert, weight, p)] of both stages."""
    chosen, stage, num = [], list(scores), len(scores)
    for k in range(2):
        top = max(stage)
        gate = []
        for j in range(num):
            scale = max(abs(scores[j]), top)
            distance = (top - scores[j]) / scale if scale != 0 else float("nan")
            gate.append(-math.inf if distance > 2 * eps else stage[j])
        weights = [math.exp(g - top) for g in gate]
        p = [w / sum(weights) for w in weights]
        if sample is None:
            expert = stage.index(top)
            weight = p[expert]
        else:
            noisy = [
                g - math.log(-math.log(u)) if g > -math.inf else -math.inf
                for g, u in zip(gate, sample[k], strict=True)
            ]
            expert = noisy.index(max(noisy))
            is_full = expert == p.index(max(p)) or heun[k] > 0.75
            weight = p[expert] * (1.0 if is_full else 0.3333)
        chosen.append((expert, weight, p))
        stage[expert] = -math.inf
    return chosen


def close_scores(num_tokens=200, num_experts=16, seed=0):
    """Logits of which about half lie within the 2 % threshold, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(num_tokens, 1, generator=generator, dtype=torch.float64) * 2
    spread = torch.rand(num_tokens, 1, generator=generator, dtype=torch.float64) * 0.1
    noise = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    return base * (1 + spread * noise)


@pytest.mark.parametrize(
    ("scores", "experts", "weights"),
    [
        ([2.0, 1.99, 1.0, -3.0], [0, 1], [0.502500, 1.0]),
        ([-1.0, -1.01, -2.0, -5.0], [0, 1], [0.502500, 1.0]),
        ([0.5, 0.4, 0.396, 0.393], [0, 1], [1.0, 0.334556]),
    ],
)
def test_the_published_vectors_are_reproduced(scores, experts, weights):
    routing = sparsemixer(torch.tensor([scores], dtype=torch.float64), threshold=EPS)
    assert routing.expert_TK.tolist() == [experts]
    assert routing.weight_TK[0].tolist() == pytest.approx(weights, abs=5e-7)


def test_evaluation_agrees_with_the_formula_in_float64():
    logit_TE = close_scores()
    routing = sparsemixer(logit_TE, threshold=EPS)
    for t, scores in enumerate(logit_TE.tolist()):
        expected = formula(scores)
        assert routing.expert_TK[t].tolist() == [e for e, _, _ in expected]
        assert routing.weight_TK[t].tolist() == pytest.approx(
            [w for _, w, _ in expected], rel=1e-12
        )


def test_sampled_training_agrees_with_the_formula_and_its_gradient():
    logit_TE = close_scores(seed=1).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    sample = torch.rand(200, 2, 16, generator=generator, dtype=torch.float64)
    heun = torch.rand(200, 2, generator=generator, dtype=torch.float64)
    routing = sparsemixer(logit_TE, threshold=EPS, sample_TKE=sample, heun_TK=heun)
    upstream = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    (routing.weight_TK * upstream).sum().backward()
    sampled_other, scaled = 0, 0
    for t, scores in enumerate(logit_TE.tolist()):
        expected = formula(scores, sample=sample[t].tolist(), heun=heun[t].tolist())
        assert routing.expert_TK[t].tolist() == [e for e, _, _ in expected]
        assert routing.weight_TK[t].tolist() == pytest.approx(
            [w for _, w, _ in expected], rel=1e-12
        )
        gradient = [0.0] * 16
        for k, (expert, weight, p) in enumerate(expected):
            flow = float(upstream[t, k]) * p[expert]  # the Heun scale is not in the gradient
            for i in range(16):
                gradient[i] += flow * ((i == expert) - p[i])
            sampled_other += expert != p.index(max(p))
            scaled += weight < 0.9 * p[expert]
        assert logit_TE.grad[t].tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-15)
    assert sampled_other > 50  # the test saw draws that are not the argmax
    assert scaled > 30  # and values scaled by 0.3333


def test_the_evaluation_gradient_is_the_ordinary_derivative():
    logit_TE = close_scores(num_tokens=12, seed=3).requires_grad_()
    keep = sparsemixer(logit_TE, threshold=EPS)
    assert (keep.weight_TK < 1).any()  # else every derivative is 0 and the check is empty
    assert torch.autograd.gradcheck(lambda s: sparsemixer(s, threshold=EPS).weight_TK, logit_TE)


def test_all_scores_zero_survive_instead_of_becoming_nan():
    routing = sparsemixer(torch.zeros(1, 16), threshold=EPS)
    assert routing.weight_TK[0].tolist() == pytest.approx([1 / 16, 1 / 15])


def test_samples_follow_the_masked_softmax():
    scores = torch.tensor([2.0, 1.99, 1.985, 1.0])
    num = 40_000
    generator = torch.Generator().manual_seed(0)
    routing = sparsemixer(
        scores.expand(num, 4),
        threshold=EPS,
        sample_TKE=torch.rand(num, 2, 4, generator=generator),
        heun_TK=torch.rand(num, 2, generator=generator),
    )
    share = torch.bincount(routing.expert_TK[:, 0], minlength=4) / num
    expected = scores[:3].softmax(0)
    # four standard deviations of a share of 40,000 draws
    assert (share[:3] - expected).abs().max() < 4 * (0.25 / num) ** 0.5
    assert share[3] == 0


def test_a_full_scale_is_drawn_for_a_quarter_of_the_other_choices():
    num = 40_000
    generator = torch.Generator().manual_seed(0)
    routing = sparsemixer(
        torch.tensor([2.0, 2.0, -9.0, -9.0]).expand(num, 4),
        threshold=EPS,
        sample_TKE=torch.rand(num, 2, 4, generator=generator),
        heun_TK=torch.rand(num, 2, generator=generator),
    )
    other = routing.weight_TK[:, 0][routing.expert_TK[:, 0] == 1]
    assert float((other > 0.4).float().mean()) == pytest.approx(0.25, abs=4 * (0.19 / 2e4) ** 0.5)


@pytest.mark.parametrize("renormalise", [False, True])
def test_topk_agrees_with_sorting_a_softmax(renormalise):
    model = ModelConfig(hidden_size=8, num_experts=5, top_k=3, num_layers=1)
    router = ROUTERS["topk"](model, RouterConfig(name="topk", renormalise=renormalise), layer=0)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(20, 8)
    routing = router(x_TD, None)
    for t in range(20):
        scores = [
            sum(a * b for a, b in zip(x_TD[t].tolist(), w, strict=True))
            for w in router.weight.tolist()
        ]
        p = [math.exp(s) / sum(math.exp(r) for r in scores) for s in scores]
        best = sorted(range(5), key=lambda j: -p[j])[:3]
        norm = sum(p[j] for j in best) if renormalise else 1.0
        assert routing.expert_TK[t].tolist() == best
        assert routing.weight_TK[t].tolist() == pytest.approx([p[j] / norm for j in best], rel=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_logits_stay_float32_under_autocast(name):
    router = ROUTERS[name](ModelConfig(hidden_size=64), RouterConfig(name=name), layer=0)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(32, 64)
    plain = router(x_TD, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = router(x_TD, None)
    assert torch.equal(plain.logit_TE, under.logit_TE)
    assert under.weight_TK.dtype == torch.float32


def test_a_training_choice_does_not_depend_on_the_rest_of_the_batch():
    router = ROUTERS["sparsemixer"](ModelConfig(hidden_size=8), RouterConfig(), layer=3)
    torch.nn.init.normal_(router.weight, std=0.01)
    x_TD = torch.randn(24, 8)
    key_T = token_keys(5, torch.arange(4), seq_len=6).flatten()
    whole = router(x_TD, key_T)
    parts = [router(x_TD[i : i + 8], key_T[i : i + 8]) for i in (0, 8, 16)]
    assert torch.equal(whole.expert_TK, torch.cat([p.expert_TK for p in parts]))
