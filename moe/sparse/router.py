"""How each token chooses its experts: the Routing, the routers, and the table of them.

A router is an nn.Module with `forward(x_TD, key_T) -> Routing`; key_T (moe/sparse/noise.py) asks
for the training-time choice, None for the evaluation-time one. Logits and weights are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import phi_kernels
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.config import RouterConfig
from moe.model_config import ModelConfig
from moe.sparse.autocast import without_autocast
from moe.sparse.noise import PURPOSE_EXPERT_SAMPLE, PURPOSE_HEUN, uniform


class Routing(NamedTuple):
    """The choice of every token; the only thing that losses, metrics and traces read."""

    weight_TK: Tensor  # float32, multiplies the expert's output
    expert_TK: Tensor  # int64, in order of choice
    logit_TE: Tensor  # float32, with gradient
    count_E: Tensor  # int64, choices of each expert, padding included


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
        chosen = phi_kernels.top_k_softmax(
            logit_TE, top_k=self.top_k, renormalise=self.config.renormalise
        )
        return _routing(chosen, logit_TE)


class SparseMixerRouter(_Gate):
    """SparseMixer-v2, the router of Phi-3.5-MoE and GRIN (arXiv 2409.12136, appendix A)."""

    def forward(self, x_TD: Tensor, key_T: Tensor | None) -> Routing:
        logit_TE = self.logits(x_TD)
        threshold = self.config.mask_threshold
        if key_T is None:
            return _routing(phi_kernels.sparsemixer(logit_TE, threshold=threshold), logit_TE)
        num_experts = logit_TE.shape[1]
        sample_TKE = uniform(
            key_T, layer=self.layer, purpose=PURPOSE_EXPERT_SAMPLE, width=2 * num_experts
        ).view(-1, 2, num_experts)
        heun_TK = uniform(key_T, layer=self.layer, purpose=PURPOSE_HEUN, width=2)
        chosen = phi_kernels.sparsemixer(
            logit_TE, threshold=threshold, sample_TKE=sample_TKE, heun_TK=heun_TK
        )
        return _routing(chosen, logit_TE)


ROUTERS: dict[str, type[_Gate]] = {"sparsemixer": SparseMixerRouter, "topk": TopKRouter}


def _routing(chosen: tuple[Tensor, Tensor, Tensor], logit_TE: Tensor) -> Routing:
    weight_TK, expert_TK, count_E = chosen
    return Routing(weight_TK, expert_TK, logit_TE, count_E)
