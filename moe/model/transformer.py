"""The decoder: embedding, pre-norm blocks, final norm, head; Phi-3.5-MoE when given its numbers.

One file for the family: a block's feed-forward is the sparse layer or a dense SwiGLU, its norm
LayerNorm or RMSNorm, its projections with or without biases, all by ModelConfig.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ExpertsConfig, ModelConfig, RouterConfig
from moe.model.attention import Attention, KeyValueCache, attention_mask
from moe.model.feedforward import DenseSwiGLU
from moe.model.init import initialise
from moe.model.layers import Embedding, Linear
from moe.model.norm import make_norm
from moe.model.rope import rotary_tables
from moe.sparse.layer import MoELayer
from moe.sparse.router import Routing


class Output(NamedTuple):
    """What a forward pass produces; routings is empty for a dense model."""

    logits: Tensor  # (B, S, V), in the dtype of the head's product
    routings: tuple[Routing, ...]  # one a layer


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(
        self, model: ModelConfig, router: RouterConfig, experts: ExpertsConfig, *, layer: int
    ) -> None:
        super().__init__()
        self.attention_norm = make_norm(model)
        self.attention = Attention(model)
        self.feed_forward_norm = make_norm(model)
        self.feed_forward = (
            MoELayer(model, router, experts, layer=layer) if model.is_sparse else DenseSwiGLU(model)
        )

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        key_BS: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attention(
            self.attention_norm(x_BSD), rotary, mask=mask, cache=cache, start=start
        )
        y_BSD, routing = self.feed_forward(self.feed_forward_norm(x_BSD), key_BS)
        return x_BSD + y_BSD, routing


class Transformer(nn.Module):
    """logits, routings = model(tokens_BS); forward takes positions, documents, noise and caches."""

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        *,
        recompute_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.recompute_activations = model, recompute_activations
        self.embed = Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(
            Block(model, router, experts, layer=layer) for layer in range(model.num_layers)
        )
        self.norm = make_norm(model)
        self.head = Linear(model.hidden_size, model.vocab_size, bias=model.head_bias)
        if model.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        position_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        key_BS: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
        start: int = 0,
    ) -> Output:
        """Return logits (B, S, V) and each layer's Routing.

        position_BS: of each token in its document; counted from `start` if absent.
        document_BS: attention does not cross documents; absent means one document.
        key_BS: moe.sparse.noise.token_keys, asks for training-time routing (jitter, sampling);
            a sparse model in training mode needs it (ValueError).
        caches, start: tokens_BS continues texts of which `start` tokens are cached; the caches are
            written in place.
        """
        if self.training and self.config.is_sparse and key_BS is None:
            raise ValueError(
                "a sparse model in training mode needs key_BS (moe.sparse.noise.token_keys); "
                "call model.eval() for evaluation-time routing"
            )
        num_queries = tokens_BS.shape[1]
        num_keys = start + num_queries
        if position_BS is None:
            position_BS = torch.arange(start, num_keys, device=tokens_BS.device)[None]
        rotary = rotary_tables(position_BS, self.config.rope, head_dim=self.config.head_dim)
        mask = attention_mask(
            num_queries=num_queries,
            num_keys=num_keys,
            document_BS=document_BS,
            window=self.config.sliding_window,
            device=tokens_BS.device,
        )
        x_BSD, routings = self.embed(tokens_BS), []
        for layer, block in enumerate(self.blocks):
            inputs = (x_BSD, rotary, mask, key_BS, caches[layer] if caches else None, start)
            if self.recompute_activations and torch.is_grad_enabled():
                x_BSD, routing = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BSD, routing = block(*inputs)
            if routing is not None:
                routings.append(routing)
        return Output(self.head(self.norm(x_BSD)), tuple(routings))


def build_model(
    model: ModelConfig,
    router: RouterConfig | None = None,
    experts: ExpertsConfig | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    recompute_activations: bool = False,
) -> Transformer:
    """Return a float32 model with initialised parameters (moe/model/init.py) on the device.

    device="meta" gives shapes only, for counting and planning.
    """
    with torch.device("meta"):
        built = Transformer(
            model,
            router or RouterConfig(),
            experts or ExpertsConfig(),
            recompute_activations=recompute_activations,
        )
    if torch.device(device).type == "meta":
        return built
    built = built.to_empty(device=device)
    if model.tie_embeddings:  # to_empty gives tied weights separate memory
        built.head.weight = built.embed.weight
    initialise(built, model, seed=seed)
    return built
