"""The decoder: embedding, pre-norm blocks, final norm, head; Phi-3.5-MoE when given its numbers.

One file for the family: a block's feed-forward is the sparse layer or a dense one, its norm
LayerNorm or RMSNorm, its attention dense or block-sparse, its projections with or without biases,
all by ModelConfig.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe.config import ExpertsConfig, RouterConfig
from moe.model.attention import Attention, KeyValueCache, Visibility, visibility
from moe.model.dropout import dropout
from moe.model.feedforward import DenseFeedForward
from moe.model.init import WhenReady, materialise
from moe.model.layers import Embedding, Linear
from moe.model.norm import make_norm
from moe.model.rope import rotary_tables
from moe.model_config import ModelConfig
from moe.sparse.dispatch import Placement
from moe.sparse.forced import Forced, last_places
from moe.sparse.layer import MoELayer
from moe.sparse.noise import PURPOSE_EMBEDDING_DROPOUT
from moe.sparse.router import Routing


class Output(NamedTuple):
    """What a forward pass produces; routings is empty for a dense model."""

    logits: Tensor  # (B, S, V), in the dtype of the head's product
    routings: tuple[Routing, ...]  # one a layer


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

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
        self.attention_norm = make_norm(model)
        self.attention = Attention(model, layer=layer)
        self.feed_forward_norm = make_norm(model)
        self.feed_forward = (
            MoELayer(model, router, experts, layer=layer, placement=placement)
            if model.is_sparse
            else DenseFeedForward(model, layer=layer)
        )

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        key_BS: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
        num_queries: int,
        forced: Forced | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return the last num_queries places of x after this block, and their routing."""
        y_BSD = self.attention(
            self.attention_norm(x_BSD), rotary, visibility=visible, cache=cache, start=start,
            num_queries=num_queries,
        )  # fmt: skip
        x_BSD = x_BSD[:, -num_queries:] + y_BSD
        key_BS = None if key_BS is None else key_BS[:, -num_queries:]
        choice = () if forced is None else (forced,)
        y_BSD, routing = self.feed_forward(self.feed_forward_norm(x_BSD), key_BS, *choice)
        return x_BSD + y_BSD, routing


class Transformer(nn.Module):
    """logits, routings = model(tokens_BS); forward takes positions, documents, noise, caches."""

    def __init__(
        self,
        model: ModelConfig,
        router: RouterConfig,
        experts: ExpertsConfig,
        *,
        recompute_activations: bool = False,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        self.config, self.recompute_activations = model, recompute_activations
        self.embed = Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(
            Block(model, router, experts, layer=layer, placement=placement)
            for layer in range(model.num_layers)
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
        padding_B: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
        start: int = 0,
        last_only: bool = False,
        route_all: bool = False,
        forced: Sequence[Forced | None] | None = None,
    ) -> Output:
        """Return logits (B, S, V) and each layer's Routing.

        position_BS: of each token in its document; counted from `start`, without padding, if
            absent. Padding behind a text is at position 0, or it counts to the text's length, which
            decides between LongRoPE's factors.
        document_BS: attention does not cross documents, and each has LongRoPE's factors of its own
            length; absent means one document.
        key_BS: moe.sparse.noise.token_keys, asks for training-time noise (jitter, sampling,
            dropout); a model that has any needs it in training mode (ValueError).
        padding_B: places before each row's text, which nothing sees; with a cache, those of the
            cached text.
        caches, start: tokens_BS continues texts of which `start` tokens are cached; the caches are
            written in place.
        last_only: logits (B, 1, V) of the last place alone; the last block then works for that
            place only, and its Routing is of that place.
        route_all: with last_only, the last block works for every place, for its whole Routing.
        forced: one a layer, for the T = B * S tokens; takes the place of what the router chose,
            None of nothing. See moe.sparse.forced.
        """
        config = self.config
        if self.training and self._has_noise and key_BS is None:
            raise ValueError(
                "a model with experts or dropout needs key_BS in training mode "
                "(moe.sparse.noise.token_keys); call model.eval() for evaluation"
            )
        if forced is not None and len(forced) != len(self.blocks) * config.is_sparse:
            raise ValueError(
                f"forced: got {len(forced)} layers; the model has "
                f"{len(self.blocks) * config.is_sparse} sparse layers"
            )
        num_queries = tokens_BS.shape[1]
        num_keys = start + num_queries
        if position_BS is None:
            position_BS = torch.arange(start, num_keys, device=tokens_BS.device)[None]
            if padding_B is not None:
                position_BS = (position_BS - padding_B[:, None]).clamp(min=0)
        rotary = rotary_tables(
            position_BS, config.rope, rotary_dim=config.rotary_dim, document_BS=document_BS
        )
        see = functools.partial(
            visibility, config, num_keys=num_keys, padding_B=padding_B, device=tokens_BS.device
        )
        visible = see(num_queries=num_queries, document_BS=document_BS)
        # a generated text needs its last place only: all keys and values, but one query
        is_narrow = last_only and document_BS is None and not route_all
        x_BSD, routings = self._embed(tokens_BS, key_BS), []
        for layer, block in enumerate(self.blocks):
            if is_narrow and layer + 1 == len(self.blocks):
                num_queries = 1
                visible = see(num_queries=1, document_BS=None)
            cache = caches[layer] if caches else None
            choice = forced[layer] if forced else None
            if choice is not None and num_queries < tokens_BS.shape[1]:
                choice = last_places(choice, num_queries, num_rows=len(tokens_BS))
            inputs = (x_BSD, rotary, visible, key_BS, cache, start, num_queries, choice)
            if self.recompute_activations and torch.is_grad_enabled():
                x_BSD, routing = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x_BSD, routing = block(*inputs)
            if routing is not None:
                routings.append(routing)
        return Output(self._logits(x_BSD[:, -1:] if last_only else x_BSD), tuple(routings))

    @property
    def _has_noise(self) -> bool:
        dropouts = self.config.embedding_dropout + self.config.feed_forward_dropout
        return self.config.is_sparse or dropouts > 0

    def _embed(self, tokens_BS: Tensor, key_BS: Tensor | None) -> Tensor:
        x_BSD = self.embed(tokens_BS)
        x_BSD = dropout(
            x_BSD, key_BS, share=self.config.embedding_dropout, layer=0,
            purpose=PURPOSE_EMBEDDING_DROPOUT,
        )  # fmt: skip
        multiplier = self.config.embedding_multiplier
        return x_BSD if multiplier == 1.0 else x_BSD * multiplier

    def _logits(self, x_BSD: Tensor) -> Tensor:
        logits = self.head(self.norm(x_BSD))
        if self.config.logit_divisor != 1.0:
            logits = logits / self.config.logit_divisor
        if self.config.masked_tokens:
            masked = torch.tensor(self.config.masked_tokens, device=logits.device)
            logits = logits.index_fill(-1, masked, torch.finfo(logits.dtype).min)
        return logits


def build_model(
    model: ModelConfig,
    router: RouterConfig | None = None,
    experts: ExpertsConfig | None = None,
    *,
    seed: int | None = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    recompute_activations: bool = False,
    placement: Placement | None = None,
    when_ready: WhenReady | None = None,
) -> Transformer:
    """Return a model with initialised parameters (moe/model/init.py) on the device.

    device="meta" gives shapes only, for counting and planning. dtype: float32 for training, unless
    an engine keeps float32 values itself (parallel.bf16_parameters); a checkpoint's own type for
    inference. With a placement only the experts that it holds exist here: no process ever has
    memory for the others. seed None, for parameters that are loaded, and when_ready: see
    moe.model.init.materialise.
    """
    with torch.device("meta"):
        built = Transformer(
            model,
            router or RouterConfig(),
            experts or ExpertsConfig(),
            recompute_activations=recompute_activations,
            placement=placement,
        ).to(dtype)
    if torch.device(device).type == "meta":
        return built
    first = placement.held.start if placement else 0
    materialise(built, model, seed=seed, device=device, first_expert=first, when_ready=when_ready)
    return built
