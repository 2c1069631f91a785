"""The dense SwiGLU block of phi-3 mini and medium."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from moe.config import ModelConfig
from moe.model.layers import Linear


class DenseSwiGLU(nn.Module):
    """y = W2 (silu(W1 x) * W3 x), no biases; W1 above W3 in one matrix, as phi-3 stores them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, key_BS: Tensor | None) -> tuple[Tensor, None]:
        """Return y and no Routing; key_BS is what a sparse block would draw its noise from."""
        gate, up = self.gate_up(x_BSD).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up), None
