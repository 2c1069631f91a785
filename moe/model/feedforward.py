"""The dense feed-forward blocks: SwiGLU (phi-3 mini and medium) and GEGELU (phi-3-small)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.model.dropout import dropout
from moe.model.layers import Linear
from moe.model_config import ModelConfig
from moe.sparse.noise import PURPOSE_FEED_FORWARD_DROPOUT


class DenseFeedForward(nn.Module):
    """y = W2 (activation(W1 x) combined with W3 x); W1 above W3 in one matrix."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.feed_forward_bias
        self.gate_up = Linear(d, 2 * f, bias=bias)
        self.down = Linear(f, d, bias=bias)
        self.combine = {"swiglu": swiglu, "gegelu": gegelu}[config.feed_forward]
        self.limit, self.dropout, self.layer = (
            config.gegelu_limit,
            config.feed_forward_dropout,
            layer,
        )

    def forward(self, x_BSD: Tensor, key_BS: Tensor | None) -> tuple[Tensor, None]:
        """Return y and no Routing; key_BS is what dropout draws from, None without training."""
        gate, up = self.gate_up(x_BSD).chunk(2, dim=-1)
        y_BSD = self.down(self.combine(gate, up, limit=self.limit))
        y_BSD = dropout(
            y_BSD, key_BS, share=self.dropout, layer=self.layer,
            purpose=PURPOSE_FEED_FORWARD_DROPOUT,
        )  # fmt: skip
        return y_BSD, None


def swiglu(gate: Tensor, up: Tensor, *, limit: float) -> Tensor:
    """silu(gate) * up; it has no limit."""
    if torch.is_grad_enabled():
        return functional.silu(gate) * up
    return functional.silu(gate).mul_(up)  # one large temporary less


def gegelu(gate: Tensor, up: Tensor, *, limit: float) -> Tensor:
    """quick_gelu(min(gate, limit)) * (clamp(up, -limit, limit) + 1); infinities stay as they are.

    quick_gelu(a) = a * sigmoid(1.702 a). Source: modeling_phi3_small.py of the released model.
    """
    gate = torch.where(gate.isinf(), gate, gate.clamp(max=limit))
    up = torch.where(up.isinf(), up, up.clamp(min=-limit, max=limit))
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)
