"""The experts' weights, and the table of back-ends that apply them to tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import phi_kernels
import torch
from phi_kernels import DispatchPlan
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ExpertsConfig
from moe.model_config import ModelConfig
from moe.sparse import megablocks_experts
from moe.sparse.autocast import in_product_type

# (x_TD, weight_TK, plan, gate_up_EHD, down_EDF) -> y_TD, as phi_kernels.reference_expert_mlp
ExpertMlp = Callable[[Tensor, Tensor, DispatchPlan, Tensor, Tensor], Tensor]


def _by_device(
    x_TD: Tensor,
    weight_TK: Tensor,
    plan: DispatchPlan,
    gate_up_EHD: Tensor,
    down_EDF: Tensor,
    *,
    recompute: bool = False,
) -> Tensor:
    """Triton on a GPU, for what its kernels take; the reference for the rest; cpu on a CPU."""
    arguments = (x_TD, weight_TK, plan, gate_up_EHD, down_EDF)
    if phi_kernels.triton_takes(x_TD, down_EDF):
        return phi_kernels.triton_expert_mlp(*arguments, recompute=recompute)
    is_cpu = x_TD.device.type == "cpu"
    expert_mlp = phi_kernels.cpu_expert_mlp if is_cpu else phi_kernels.reference_expert_mlp
    return _recomputed(expert_mlp, *arguments) if recompute else expert_mlp(*arguments)


def _recomputed(expert_mlp: ExpertMlp, *arguments: Any) -> Tensor:
    """Keep the inputs only, and compute everything again in the backward pass."""
    return checkpoint(expert_mlp, *arguments, use_reentrant=False, preserve_rng_state=False)


EXPERT_BACKENDS: dict[str, ExpertMlp] = {
    "auto": _by_device,
    "cpu": phi_kernels.cpu_expert_mlp,
    "grouped_mm": phi_kernels.grouped_mm_expert_mlp,
    "megablocks": megablocks_experts.expert_mlp,
    "reference": phi_kernels.reference_expert_mlp,
    "triton": phi_kernels.triton_expert_mlp,
}
# the first product again and nothing else; the others compute everything again
_RECOMPUTING: dict[str, ExpertMlp] = {
    "auto": functools.partial(_by_device, recompute=True),
    "triton": functools.partial(phi_kernels.triton_expert_mlp, recompute=True),
}
# raises ConfigError where the back-end's packages are not installed
_CHECKS: dict[str, Callable[[], object]] = {
    "megablocks": megablocks_experts.load_grouped_product,
}


def choose_expert_mlp(experts: ExpertsConfig) -> ExpertMlp:
    """Return the configured back-end; ConfigError where it is optional and not installed."""
    if experts.backend in _CHECKS:
        _CHECKS[experts.backend]()
    expert_mlp = EXPERT_BACKENDS[experts.backend]
    if not experts.recompute:
        return expert_mlp
    return _RECOMPUTING.get(experts.backend, functools.partial(_recomputed, expert_mlp))


class GroupedExperts(nn.Module):
    """Stacked SwiGLU experts without biases: tokens, weights and their plan in, y_TD out."""

    def __init__(
        self, model: ModelConfig, experts: ExpertsConfig, *, num_held: int | None = None
    ) -> None:
        super().__init__()
        num_experts = model.num_experts if num_held is None else num_held
        d, f = model.hidden_size, model.intermediate_size
        # W1 above W3, as transformers 5 holds them; one matrix product makes gate and up
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * f, d))
        self.down = nn.Parameter(torch.empty(num_experts, d, f))
        self._expert_mlp = choose_expert_mlp(experts)

    def forward(self, x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan) -> Tensor:
        x_TD = in_product_type(x_TD)
        dtype = x_TD.dtype
        return self._expert_mlp(x_TD, weight_TK, plan, self.gate_up.to(dtype), self.down.to(dtype))
