"""How each token chooses its experts: the Routing, the routers, and the table of them.

A router is an nn.Module with `forward(x_TD, key_T) -> Routing`; key_T (moe/sparse/noise.py) asks
for the training-time choice, None for the evaluation-time one. Logits and weights are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.config import RouterConfig
from moe.model_config import ModelConfig
from moe.sparse.autocast import without_autocast
from moe.sparse.noise import PURPOSE_EXPERT_SAMPLE, PURPOSE_HEUN, uniform

HEUN_SCALE = 0.3333  # of the released code, not 1/3 (SparseMixer/sparsemixer_v2.py)


class Routing(NamedTuple):
    """The choice of every token; the only thing that losses, metrics and traces read."""

    weight_TK: Tensor  # float32, multiplies the expert's output
    expert_TK: Tensor  # int64, in order of choice
    logit_TE: Tensor  # float32, with gradient


class _Gate(nn.Module):
    """The router's only parameter: logits = x W^T in float32 (float64 for tests), no bias."""

    def __init__(self, model: ModelConfig, router: RouterConfig, *, layer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.num_experts, model.hidden_size))
        self.top_k, self.config, self.layer = model.top_k, router, layer

    def logits(self, x_TD: Tensor) -> Tensor:
        # outside autocast: bfloat16 logits (8 bits) would move experts across the 2 % threshold
        dtype = torch.promote_types(torch.float32, self.weight.dtype)
        with without_autocast(x_TD.device.type):
            return functional.linear(x_TD.to(dtype), self.weight.to(dtype))


class TopKRouter(_Gate):
    """Softmax over all experts, the K largest; weights divided by their sum if so configured."""

    def forward(self, x_TD: Tensor, key_T: Tensor | None) -> Routing:
        logit_TE = self.logits(x_TD)
        weight_TK, expert_TK = logit_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.config.renormalise:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return Routing(weight_TK, expert_TK, logit_TE)


class SparseMixerRouter(_Gate):
    """SparseMixer-v2, the router of Phi-3.5-MoE and GRIN (arXiv 2409.12136, appendix A)."""

    def forward(self, x_TD: Tensor, key_T: Tensor | None) -> Routing:
        logit_TE = self.logits(x_TD)
        if key_T is None:
            return sparsemixer(logit_TE, threshold=self.config.mask_threshold)
        num_experts = logit_TE.shape[1]
        sample_TKE = uniform(
            key_T, layer=self.layer, purpose=PURPOSE_EXPERT_SAMPLE, width=2 * num_experts
        ).view(-1, 2, num_experts)
        heun_TK = uniform(key_T, layer=self.layer, purpose=PURPOSE_HEUN, width=2)
        return sparsemixer(
            logit_TE, threshold=self.config.mask_threshold, sample_TKE=sample_TKE, heun_TK=heun_TK
        )


ROUTERS: dict[str, type[_Gate]] = {"sparsemixer": SparseMixerRouter, "topk": TopKRouter}


def sparsemixer(
    logit_TE: Tensor,
    *,
    threshold: float,
    sample_TKE: Tensor | None = None,
    heun_TK: Tensor | None = None,
) -> Routing:
    """Choose two experts without replacement; weights are not renormalised (their sum is about 2).

    sample_TKE (T, 2, E) and heun_TK (T, 2) are uniform in (0, 1): given, experts are sampled and
    the router gets its own gradient (`_SampledWeight`); absent, experts are the largest and the
    gradient is the ordinary one of the masked softmax, which is 0 where one expert survives.
    Source: microsoft/SparseMixer, sparsemixer_v2.py; GRIN Algorithm 3.
    """
    stages: list[tuple[Tensor, Tensor]] = []
    stage_TE = logit_TE
    for k in range(2):
        gate_TE, expert_T = _masked(logit_TE, stage_TE, threshold)
        if sample_TKE is None or heun_TK is None:
            weight_T = _pick(gate_TE.softmax(dim=-1), expert_T)
        else:
            expert_T, weight_T = _sample(logit_TE, gate_TE, sample_TKE[:, k], heun_TK[:, k])
        stages.append((weight_T, expert_T))
        stage_TE = logit_TE.scatter(1, expert_T[:, None], float("-inf"))
    weight_TK, expert_TK = (torch.stack(parts, dim=1) for parts in zip(*stages, strict=True))
    return Routing(weight_TK, expert_TK, logit_TE)


def _masked(logit_TE: Tensor, stage_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the stage's scores, -inf for all but the survivors, and the largest's expert (T,).

    Survivors are within 2 * threshold (relative) of the stage's largest score. |.| is of the
    original scores, clamped below by the signed maximum; 0/0 counts as surviving. An expert chosen
    before is -inf in stage_TE already.
    """
    with torch.no_grad():
        top_T1, expert_T1 = stage_TE.max(dim=-1, keepdim=True)
        scale_TE = torch.maximum(logit_TE.abs(), top_T1)
        is_below_TE = (top_T1 - logit_TE) / scale_TE > 2 * threshold
    return stage_TE.masked_fill(is_below_TE, float("-inf")), expert_T1.squeeze(1)


def _sample(
    logit_TE: Tensor, gate_TE: Tensor, sample_TE: Tensor, heun_T: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        # Gumbel-max: the argmax of g - ln(e), e exponential, is a draw from softmax(g)
        expert_T = (gate_TE - (-sample_TE.log()).log()).argmax(dim=-1)
        probability_TE = gate_TE.softmax(dim=-1)
        is_full_T = (expert_T == gate_TE.argmax(dim=-1)) | (heun_T > 0.75)
        scale_T = HEUN_SCALE + (1 - HEUN_SCALE) * is_full_T.to(gate_TE.dtype)
    weight_T = _SampledWeight.apply(logit_TE, probability_TE, expert_T, scale_T)
    return expert_T, weight_T


class _SampledWeight(torch.autograd.Function):
    """w = scale * p_D, with dL/ds_i = dL/dw * p_D * (1[i = D] - p_i): scale is not applied.

    The third-order Heun estimator of GRIN equation 8: the scale moves the point at which the
    expert's gradient is taken, so it enters the forward value only.
    """

    @staticmethod
    def forward(ctx, logit_TE, probability_TE, expert_T, scale_T):
        ctx.save_for_backward(probability_TE, expert_T)
        return scale_T * _pick(probability_TE, expert_T)

    @staticmethod
    def backward(ctx, grad_T):
        probability_TE, expert_T = ctx.saved_tensors
        flow_T1 = (grad_T * _pick(probability_TE, expert_T))[:, None]
        grad_TE = (-flow_T1 * probability_TE).scatter_add(1, expert_T[:, None], flow_T1)
        return grad_TE, None, None, None


def _pick(value_TE: Tensor, expert_T: Tensor) -> Tensor:
    return value_TE.gather(1, expert_T[:, None]).squeeze(1)
