"""The two norms of the Phi-3 family, statistics in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.model_config import ModelConfig
from moe.sparse.autocast import without_autocast


class LayerNorm(nn.LayerNorm):
    """Weight and bias; Phi-3.5-MoE's norm, although its config calls the epsilon rms_norm_eps."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: moe/model/init.py fills it."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return super().forward(x)


class RMSNorm(nn.Module):
    """Weight only; the norm of phi-3 mini and medium."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm that the configuration names, over the model width."""
    kind = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}[config.norm]
    return kind(config.hidden_size, config.norm_eps)
