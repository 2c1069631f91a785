"""What each family's config.json says of the model's shape: its keys, defaults and refusals."""

from __future__ import annotations

from typing import Any

from moe.config import RouterConfig
from moe.convert.hf_rope import read_rope
from moe.convert.json_fields import Fields, shown
from moe.model_config import BlockSparseConfig, ModelConfig

# ids of phi-3-small's vocabulary that no text has: its tokenizer's dummies, the fill-in-the-middle
# marks and <|endofprompt|>; the released model never predicts them
_SMALL_VOCAB_SIZE = 100_352
SMALL_MASKED_TOKENS = (
    100_256, 100_258, 100_259, 100_260, 100_264, 100_265,
    *range(100_267, 100_277), *range(100_277, _SMALL_VOCAB_SIZE),
)  # fmt: skip


def read_phi3(fields: Fields, window: str) -> ModelConfig:
    """Return the dense model of a phi3 config.json; `window` as in read_hf_config."""
    _require(fields, {"hidden_act": "silu"}, "a SwiGLU feed-forward is all that phi3 has")
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        _refuse_unless(fields, key, False)
    _refuse_dropout(fields, "attention_dropout", "resid_pdrop")
    shape = _shape(fields, hidden_size=3072, layers=32, heads=32, kv_heads=None, window=window)
    max_position = fields.whole("max_position_embeddings", 4096)
    head_dim = shape["head_dim"]
    return ModelConfig(
        **shape,
        vocab_size=fields.whole("vocab_size", 32_064),
        intermediate_size=fields.whole("intermediate_size", 8192),
        num_experts=0,
        norm="rmsnorm",
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        attention_bias=False,
        head_bias=False,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=max_position,
        embedding_dropout=fields.fraction("embd_pdrop", 0.0),
        rope=read_rope(fields, family="phi3", head_dim=head_dim, max_position=max_position),
    )


def read_phimoe(fields: Fields, window: str) -> ModelConfig:
    """Return the model with experts of a phimoe or grinmoe config.json."""
    _require(fields, {"hidden_act": "silu"}, "experts are SwiGLU")
    # hidden_dropout: the native class does not read it; a file that asks for it meant another model
    _refuse_dropout(fields, "attention_dropout", "hidden_dropout")
    shape = _shape(fields, hidden_size=4096, layers=32, heads=32, kv_heads=8, window=window)
    max_position = fields.whole("max_position_embeddings", 131_072)
    head_dim = shape["head_dim"]
    top_k = fields.whole("num_experts_per_tok", 2)
    if top_k != 2:
        raise fields.mistake("num_experts_per_tok", "2, for which SparseMixer-v2 is defined")
    return ModelConfig(
        **shape,
        vocab_size=fields.whole("vocab_size", 32_064),
        intermediate_size=fields.whole("intermediate_size", 6400),
        num_experts=fields.whole("num_local_experts", 16, least=2),
        top_k=top_k,
        norm="layernorm",  # though its key is called rms_norm_eps
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        attention_bias=fields.flag("attention_bias", False),
        head_bias=fields.flag("lm_head_bias", False),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position=max_position,
        rope=read_rope(fields, family="phimoe", head_dim=head_dim, max_position=max_position),
    )


def read_router(fields: Fields) -> RouterConfig:
    """Return the router of the same file."""
    return RouterConfig(
        name="sparsemixer",
        mask_threshold=fields.fraction("router_jitter_noise", 0.01),
        input_jitter=fields.fraction("input_jitter_noise", 0.0),
        balance_coef=fields.number("router_aux_loss_coef", 0.001, least=0.0),
        balance="pooled",  # transformers counts the load of all layers together
    )


def read_phi3small(fields: Fields, window: str) -> ModelConfig:
    """Return the model of a phi3small config.json."""
    _require(fields, {"hidden_act": "gegelu"}, "phi-3-small has no other activation")
    _refuse_dropout(fields, "attention_dropout_prob")
    _refuse_unless(fields, "rope_position_scale", 1.0)
    if fields.is_given("ff_dim_multiplier"):
        raise fields.mistake(
            "ff_dim_multiplier",
            "null, beside ff_intermediate_size",
            fix="Give the width as ff_intermediate_size.",
        )
    shape = _shape(fields, hidden_size=4096, layers=32, heads=32, kv_heads=8, window=window)
    if shape.pop("sliding_window") is not None:
        raise fields.mistake("sliding_window", "null; block-sparse attention has no window")
    max_position = fields.whole("max_position_embeddings", 8192)
    vocab_size = fields.whole("vocab_size", _SMALL_VOCAB_SIZE)
    head_dim = shape["head_dim"]
    scale = None
    if fields.flag("mup_use_scaling", True):
        scale = fields.number("mup_attn_multiplier", 1.0) / head_dim
    return ModelConfig(
        **shape,
        vocab_size=vocab_size,
        intermediate_size=fields.whole("ff_intermediate_size", 14_336),
        num_experts=0,
        norm="layernorm",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        attention_bias=True,
        head_bias=False,
        tie_embeddings=fields.flag("tie_word_embeddings", True),
        max_position=max_position,
        feed_forward="gegelu",
        feed_forward_bias=True,
        gegelu_limit=fields.number("gegelu_limit", 20.0),
        attention_scale=scale,
        embedding_multiplier=_multiplier(fields, "mup_embedding_multiplier", 10.0),
        logit_divisor=_multiplier(fields, "mup_width_multiplier", 8.0),
        masked_tokens=_masked_tokens(fields, vocab_size),
        embedding_dropout=fields.fraction("embedding_dropout_prob", 0.1),
        feed_forward_dropout=fields.fraction("ffn_dropout_prob", 0.1),
        block_sparse=_read_block_sparse(fields),
        rope=read_rope(fields, family="phi3small", head_dim=head_dim, max_position=max_position),
    )


def _masked_tokens(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """dummy_token_indices, which our own exports write; the published files leave it to the
    tokenizer's code."""
    if fields.is_given("dummy_token_indices"):
        return fields.ids("dummy_token_indices", vocab_size=vocab_size)
    return SMALL_MASKED_TOKENS if vocab_size == _SMALL_VOCAB_SIZE else ()


def _read_block_sparse(fields: Fields) -> BlockSparseConfig:
    key = "dense_attention_every_n_layers"
    dense_every = fields.whole(key, 2) if fields.values.get(key, 2) is not None else 0
    num_local = fields.whole("blocksparse_num_local_blocks", 16, least=0)
    if num_local == 0:
        if dense_every != 1:  # there, sparse layers see columns alone
            raise fields.mistake(
                "blocksparse_num_local_blocks", f"1 or more, or 0 where {key} is 1 (all dense)"
            )
        return BlockSparseConfig()
    return BlockSparseConfig(
        num_local_blocks=num_local,
        block_size=fields.whole("blocksparse_block_size", 64),
        vertical_stride=fields.whole("blocksparse_vert_stride", 8),
        is_same_for_all_heads=fields.flag("blocksparse_homo_head_pattern", False),
        dense_every=dense_every,
    )


def _shape(
    fields: Fields, *, hidden_size: int, layers: int, heads: int, kv_heads: int | None, window: str
) -> dict[str, Any]:
    """What all families spell alike; the arguments are the defaults of the family's class."""
    hidden = fields.whole("hidden_size", hidden_size)
    num_heads = fields.whole("num_attention_heads", heads)
    head_dim = fields.whole_or_none("head_dim")
    if head_dim is None:
        if hidden % num_heads:
            raise fields.mistake(
                "num_attention_heads", f"a divisor of hidden_size={hidden}, or head_dim given"
            )
        head_dim = hidden // num_heads
    key = "num_key_value_heads"
    default = num_heads if kv_heads is None or key in fields.values else kv_heads
    num_kv_heads = fields.whole_or_none(key) or default
    if num_heads % num_kv_heads:
        raise fields.mistake(key, f"a divisor of num_attention_heads={num_heads}")
    left_window = fields.whole_or_none("sliding_window")
    more = 1 if window == "original" else 0
    return {
        "hidden_size": hidden,
        "num_layers": fields.whole("num_hidden_layers", layers),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "sliding_window": None if left_window is None else left_window + more,
        "initializer_range": fields.number("initializer_range", 0.02),
    }


def _multiplier(fields: Fields, key: str, default: float) -> float:
    """A muP multiplier: null and 0 mean none."""
    if fields.values.get(key, default) in (None, 0):
        return 1.0
    return fields.number(key, default)


def _require(fields: Fields, expected: dict[str, str], why: str) -> None:
    for key, value in expected.items():
        if fields.text(key, value) != value:
            raise fields.mistake(key, f"{value!r}; {why}")


def _refuse_unless(fields: Fields, key: str, expected: bool | float) -> None:
    if fields.is_given(key) and fields.values[key] != expected:
        raise fields.mistake(key, shown(expected))


def _refuse_dropout(fields: Fields, *keys: str) -> None:
    for key in keys:
        if fields.is_given(key) and fields.fraction(key, 0.0) != 0.0:
            raise fields.mistake(
                key,
                "0.0; this dropout is not built",
                fix="Every published model has 0.0. To use these weights without it, set the key "
                "to 0.0 in a copy of the file.",
            )
