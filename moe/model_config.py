"""The shape of a decoder of the Phi-3 family: its numbers, their checks, and parameter counts.

Standard library only, so that a wrong number is reported before torch is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config_checks import (
    check_at_least,
    check_fraction,
    check_one_of,
    check_positive,
    divisors,
)
from moe.errors import ConfigError

NORM_NAMES = ("layernorm", "rmsnorm")
FEED_FORWARD_NAMES = ("swiglu", "gegelu")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions; with factors it is LongRoPE (formulas in moe/model/rope.py).

    The factor lists have one entry for each rotated pair of a head. They belong to a checkpoint:
    where a model's lists are not published they stay null, and its usable length is the original
    length.
    """

    theta: float = 10_000.0
    original_max_position: int = 4096
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    short_mscale: float = 1.0  # multiplies cos and sin up to the original length
    long_mscale: float = 1.0  # the same beyond it
    rotary_fraction: float = 1.0  # of a head's width; the rest passes unrotated

    def __post_init__(self) -> None:
        check_positive("model.rope.theta", self.theta)
        check_positive("model.rope.short_mscale", self.short_mscale)
        check_positive("model.rope.long_mscale", self.long_mscale)
        check_at_least("model.rope.original_max_position", self.original_max_position, 1)
        if not 0.0 < self.rotary_fraction <= 1.0:
            raise ConfigError(
                f"model.rope.rotary_fraction: got {self.rotary_fraction}; it must be above 0 and "
                "at most 1 (the whole head)."
            )
        if (self.short_factor is None) != (self.long_factor is None):
            raise ConfigError(
                "model.rope: short_factor and long_factor come together; set both or neither."
            )
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name) or ():
                check_positive(f"model.rope.{name}", value)


@dataclass(frozen=True)
class BlockSparseConfig:
    """Phi-3-small's attention pattern (rule in phi_kernels/reference.py); 0 local blocks: none."""

    num_local_blocks: int = 0  # the query's own block and those just before it
    block_size: int = 64  # tokens
    vertical_stride: int = 8  # beyond the local blocks, every so many blocks
    is_same_for_all_heads: bool = False  # else the phase of the stride is the head's number
    dense_every: int = 2  # layers 1, 3, 5, ... (counted from 0) attend densely; 0: no layer does

    def __post_init__(self) -> None:
        check_at_least("model.block_sparse.num_local_blocks", self.num_local_blocks, 0)
        check_at_least("model.block_sparse.block_size", self.block_size, 1)
        check_at_least("model.block_sparse.vertical_stride", self.vertical_stride, 1)
        check_at_least("model.block_sparse.dense_every", self.dense_every, 0)

    def is_sparse_layer(self, layer: int) -> bool:
        """Whether this layer (from 0) attends by the pattern."""
        is_dense = self.dense_every > 0 and (layer + 1) % self.dense_every == 0
        return self.num_local_blocks > 0 and not is_dense


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder; with num_experts 0 its blocks are dense."""

    name: str = "tiny_moe"
    vocab_size: int = 4096  # rows of the embedding; the tokenizer may use fewer
    hidden_size: int = 256  # D
    num_layers: int = 4
    num_heads: int = 4  # H
    num_kv_heads: int = 2
    head_dim: int = 64  # C; never derived from hidden_size / num_heads (SlimMoE differs)
    intermediate_size: int = 400  # F, of one expert or of the dense block
    num_experts: int = 16  # E; 0 makes the block dense
    top_k: int = 2  # K
    norm: str = "layernorm"
    norm_eps: float = 1e-5
    attention_bias: bool = True
    head_bias: bool = True
    tie_embeddings: bool = False
    max_position: int = 4096
    # keys visible to a query, itself included; config.json's 2047 is FlashAttention's left window,
    # so 2048 here
    sliding_window: int | None = None
    initializer_range: float = 0.02
    feed_forward: str = "swiglu"  # of a dense block; experts are always SwiGLU
    feed_forward_bias: bool = False
    gegelu_limit: float = 20.0  # gegelu only: the gate's largest value, the linear part's range
    attention_scale: float | None = None  # multiplies query . key; null: 1 / sqrt(head_dim)
    embedding_multiplier: float = 1.0  # muP
    logit_divisor: float = 1.0  # muP
    masked_tokens: tuple[int, ...] = ()  # ids that are never predicted: their logit is the least
    embedding_dropout: float = 0.0  # training only
    feed_forward_dropout: float = 0.0  # training only, dense blocks
    block_sparse: BlockSparseConfig = field(default_factory=BlockSparseConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "intermediate_size", "max_position",
        ):  # fmt: skip
            check_at_least(f"model.{name}", getattr(self, name), 1)
        check_one_of("model.norm", self.norm, NORM_NAMES)
        check_one_of("model.feed_forward", self.feed_forward, FEED_FORWARD_NAMES)
        for name in (
            "norm_eps", "initializer_range", "gegelu_limit", "embedding_multiplier",
            "logit_divisor",
        ):  # fmt: skip
            check_positive(f"model.{name}", getattr(self, name))
        if self.attention_scale is not None:
            check_positive("model.attention_scale", self.attention_scale)
        for name in ("embedding_dropout", "feed_forward_dropout"):
            check_fraction(f"model.{name}", getattr(self, name))
        check_at_least("model.num_experts", self.num_experts, 0)
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads: got {self.num_kv_heads}; it must divide "
                f"model.num_heads={self.num_heads}. Allowed: {divisors(self.num_heads)}."
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"model.top_k: got {self.top_k}; allowed: 1 to "
                f"model.num_experts={self.num_experts}."
            )
        self._check_experts()
        self._check_attention()
        for token in self.masked_tokens:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"model.masked_tokens: got {token}; allowed: 0 to {self.vocab_size - 1}, "
                    f"the ids of model.vocab_size={self.vocab_size}."
                )

    def _check_experts(self) -> None:
        if not self.is_sparse:
            return
        for name, plain in (
            ("feed_forward", "swiglu"), ("feed_forward_bias", False), ("feed_forward_dropout", 0.0),
        ):  # fmt: skip
            if getattr(self, name) != plain:
                raise ConfigError(
                    f"model.{name}: got {getattr(self, name)!r} with model.num_experts="
                    f"{self.num_experts}; experts are SwiGLU without biases and dropout. Use "
                    f"model.{name}={plain}, or model.num_experts=0 for a dense block."
                )

    def _check_attention(self) -> None:
        if self.rotary_dim % 2 or self.rotary_dim < 2:
            raise ConfigError(
                f"model.head_dim: got {self.head_dim}, of which model.rope.rotary_fraction="
                f"{self.rope.rotary_fraction} rotates {self.rotary_dim}; rotary needs an even "
                "number of at least 2."
            )
        if self.sliding_window is not None:
            check_at_least("model.sliding_window", self.sliding_window, 1)
            if self.block_sparse.num_local_blocks:
                raise ConfigError(
                    f"model.sliding_window: got {self.sliding_window} with "
                    f"model.block_sparse.num_local_blocks={self.block_sparse.num_local_blocks}; "
                    "no model has both. Set one of them to null or 0."
                )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self.rope, name)
            if factors is not None and len(factors) != self.rotary_dim // 2:
                raise ConfigError(
                    f"model.rope.{name}: got {len(factors)} numbers; allowed: "
                    f"{self.rotary_dim // 2}, half of the {self.rotary_dim} rotated numbers of a "
                    f"head (model.head_dim={self.head_dim})."
                )

    @property
    def is_sparse(self) -> bool:
        """Whether the blocks have experts."""
        return self.num_experts > 0

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that are rotated."""
        return int(self.head_dim * self.rope.rotary_fraction)

    @property
    def usable_length(self) -> int:
        """The longest sequence whose rotary factors are known."""
        if self.rope.long_factor is None:
            return min(self.max_position, self.rope.original_max_position)
        return self.max_position

    @property
    def softmax_scale(self) -> float:
        """What multiplies query . key."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def num_parameters(self, *, active: bool = False) -> int:
        """Number of parameters; with active, top_k experts of each layer instead of all."""
        return sum(self.parameter_table(active=active).values())

    def parameter_table(self, *, active: bool = False) -> dict[str, int]:
        """Parameters of each part of the model, all layers together; parts of size 0 left out.

        With active, those that one token uses: top_k experts of each layer instead of all.
        """
        d, bias = self.hidden_size, self.attention_bias
        width_q, width_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * d * width_q + 2 * d * width_kv + bias * (width_q + 2 * width_kv + d)
        norm = d * (2 if self.norm == "layernorm" else 1)
        block = 3 * d * self.intermediate_size
        block += self.feed_forward_bias * (2 * self.intermediate_size + d)
        num_used = (self.top_k if active else self.num_experts) if self.is_sparse else 0
        table = {
            "embedding": self.vocab_size * d,
            "attention": self.num_layers * attention,
            "router": self.num_layers * self.num_experts * d,
            "experts": self.num_layers * num_used * block,
            "feed_forward": 0 if self.is_sparse else self.num_layers * block,
            "norms": (2 * self.num_layers + 1) * norm,
            "head": (0 if self.tie_embeddings else self.vocab_size * d)
            + self.head_bias * self.vocab_size,
        }
        return {part: count for part, count in table.items() if count}
