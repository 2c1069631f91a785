"""The experts' weights, and the table of back-ends that multiply rows by them."""

from __future__ import annotations

from collections.abc import Callable

import phi_kernels
import torch
from torch import Tensor, nn

from moe.config import ExpertsConfig
from moe.model_config import ModelConfig

ExpertMlp = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _by_device(rows_ND: Tensor, offset_E: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor) -> Tensor:
    is_cpu = rows_ND.device.type == "cpu"
    expert_mlp = phi_kernels.cpu_expert_mlp if is_cpu else phi_kernels.grouped_mm_expert_mlp
    return expert_mlp(rows_ND, offset_E, gate_up_EHD, down_EDF)


EXPERT_BACKENDS: dict[str, ExpertMlp] = {
    "auto": _by_device,
    "cpu": phi_kernels.cpu_expert_mlp,
    "grouped_mm": phi_kernels.grouped_mm_expert_mlp,
    "reference": phi_kernels.reference_expert_mlp,
}


class GroupedExperts(nn.Module):
    """Stacked SwiGLU experts without biases: rows_ND and their offsets in, rows_ND out."""

    def __init__(self, model: ModelConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        num_experts, d, f = model.num_experts, model.hidden_size, model.intermediate_size
        # W1 above W3, as transformers 5 holds them; one matrix product makes gate and up
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * f, d))
        self.down = nn.Parameter(torch.empty(num_experts, d, f))
        self._expert_mlp = EXPERT_BACKENDS[experts.backend]

    def forward(self, rows_ND: Tensor, offset_E: Tensor) -> Tensor:
        device = rows_ND.device.type
        dtype = rows_ND.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return self._expert_mlp(
            rows_ND.to(dtype), offset_E, self.gate_up.to(dtype), self.down.to(dtype)
        )
