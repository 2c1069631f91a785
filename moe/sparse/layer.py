"""The sparse feed-forward layer: jitter, router, dispatch, experts, combine."""

from __future__ import annotations

from torch import Tensor, nn

from moe.config import ExpertsConfig, RouterConfig
from moe.model_config import ModelConfig
from moe.sparse.dispatch import LocalDispatcher, Placement
from moe.sparse.experts import GroupedExperts
from moe.sparse.forced import Forced, force
from moe.sparse.noise import PURPOSE_INPUT_JITTER, symmetric
from moe.sparse.router import ROUTERS, Routing


class MoELayer(nn.Module):
    """y_BSD, Routing = layer(x_BSD, key_BS); key_BS None is evaluation: no jitter, no sampling.

    With forced, what it says takes the place of the router's choice, in the Routing too.
    """

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        *,
        layer: int,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        here = placement or Placement(range(model.num_experts), LocalDispatcher())
        self.router = ROUTERS[router.name](model, router, layer=layer)
        self.experts = GroupedExperts(model, experts, num_held=len(here.held))
        self.dispatcher = here.dispatcher
        self.num_experts, self.layer, self.input_jitter = (
            model.num_experts,
            layer,
            router.input_jitter,
        )

    def forward(
        self, x_BSD: Tensor, key_BS: Tensor | None, forced: Forced | None = None
    ) -> tuple[Tensor, Routing]:
        x_TD = x_BSD.flatten(0, 1)
        key_T = None if key_BS is None else key_BS.flatten()
        if key_T is not None and self.input_jitter > 0:
            x_TD = x_TD * self._jitter(key_T, width=x_TD.shape[1]).to(x_TD.dtype)
        routing: Routing = self.router(x_TD, key_T)
        if forced is not None:
            routing = force(routing, forced)
        sent, exchange = self.dispatcher.dispatch(x_TD, routing, num_experts=self.num_experts)
        y_TD = self.dispatcher.combine(self.experts(*sent), routing, exchange)
        return y_TD.view_as(x_BSD), routing

    def _jitter(self, key_T: Tensor, *, width: int) -> Tensor:
        """Factors (T, D), uniform in (1 - jitter, 1 + jitter); gate and experts both see them."""
        noise_TD = symmetric(key_T, layer=self.layer, purpose=PURPOSE_INPUT_JITTER, width=width)
        return 1.0 + self.input_jitter * noise_TD
