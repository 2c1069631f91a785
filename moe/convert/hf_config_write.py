"""Writes a ModelConfig as a published config.json, which transformers opens without remote code.

The spelling is that of transformers 4, which 5 reads too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moe.config import RouterConfig
from moe.convert.hf_rope import rope_values
from moe.errors import ConfigError
from moe.model_config import ModelConfig

WINDOW_NAMES = ("original", "transformers")
# what each family's config.json has no key for
_FIXED: dict[str, dict[str, object]] = {
    "phi3": {
        "norm": "rmsnorm",
        "attention_bias": False,
        "head_bias": False,
        "feed_forward_bias": False,
        "feed_forward_dropout": 0.0,
        "embedding_multiplier": 1.0,
        "logit_divisor": 1.0,
        "masked_tokens": (),
    },
    "phimoe": {
        "norm": "layernorm",
        "top_k": 2,
        "embedding_dropout": 0.0,
        "embedding_multiplier": 1.0,
        "logit_divisor": 1.0,
        "masked_tokens": (),
    },
    "phi3small": {
        "norm": "layernorm",
        "attention_bias": True,
        "head_bias": False,
        "feed_forward_bias": True,
        "sliding_window": None,
    },
}
# the class names of the published files, by which vLLM, SGLang and llama.cpp look a model up;
# transformers, whose own class is PhimoeForCausalLM, goes by model_type
ARCHITECTURES = {
    "phi3": "Phi3ForCausalLM", "phimoe": "PhiMoEForCausalLM", "phi3small": "Phi3SmallForCausalLM",
}  # fmt: skip
_LLAMA_VOCAB_SIZE, _TIKTOKEN_VOCAB_SIZE = 32_064, 100_352
_LLAMA_IDS = {
    "bos_token_id": 1, "eos_token_id": [32_000, 32_001, 32_007], "pad_token_id": 32_000,
}  # fmt: skip
_TIKTOKEN_IDS = {
    "bos_token_id": 100_257, "eos_token_id": [100_257, 100_266], "pad_token_id": 100_257,
}  # fmt: skip


def family_of(model: ModelConfig) -> str:
    """The published architecture that a model would be: phimoe, phi3small or phi3."""
    if model.is_sparse:
        return "phimoe"
    return "phi3small" if model.feed_forward == "gegelu" else "phi3"


def published_special_ids(model: ModelConfig) -> dict[str, Any]:
    """bos_token_id, eos_token_id (all that end a text, the end of text first) and pad_token_id of
    the published vocabulary of the model's size; empty for another size."""
    is_small = family_of(model) == "phi3small"
    if model.vocab_size != (_TIKTOKEN_VOCAB_SIZE if is_small else _LLAMA_VOCAB_SIZE):
        return {}
    return dict(_TIKTOKEN_IDS if is_small else _LLAMA_IDS)


def to_hf_config(
    model: ModelConfig,
    router: RouterConfig,
    *,
    dtype: str,
    window: str = "original",
    special_ids: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the values of a config.json that describes this model and router.

    dtype is the weights', e.g. "bfloat16"; window as in read_hf_config. special_ids: the
    tokenizer's, as published_special_ids, which stands in for None; an id that is not known is
    null. Read back, it gives the same model, except that a model without known LongRoPE factors
    is written up to its usable length.

    ConfigError where no published architecture holds the model, naming the first key in the way.
    """
    if window not in WINDOW_NAMES:
        raise ConfigError(f"window: got {window!r}; allowed: {', '.join(WINDOW_NAMES)}.")
    family = family_of(model)
    _check_held(model, router, family)
    write = {"phi3": _phi3, "phimoe": _phimoe, "phi3small": _phi3small}[family]
    ids = published_special_ids(model) if special_ids is None else special_ids
    values = {
        **write(model, router),
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "bos_token_id": ids.get("bos_token_id"),
        "eos_token_id": next(iter(ids.get("eos_token_id", ())), None),
        "pad_token_id": ids.get("pad_token_id"),
        "hidden_size": model.hidden_size,
        "initializer_range": model.initializer_range,
        "num_attention_heads": model.num_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **rope_values(model, family=family),
    }
    if model.num_heads * model.head_dim != model.hidden_size:
        values["head_dim"] = model.head_dim
    if family != "phi3small":
        values["sliding_window"] = _left_window(model, window)
    return dict(sorted(values.items()))


def _phi3(model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "embd_pdrop": model.embedding_dropout,
        "hidden_act": "silu",
        "intermediate_size": model.intermediate_size,
        "resid_pdrop": 0.0,
        "rms_norm_eps": model.norm_eps,
    }


def _phimoe(model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    return {
        "attention_bias": model.attention_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "input_jitter_noise": router.input_jitter,
        "intermediate_size": model.intermediate_size,
        "lm_head_bias": model.head_bias,
        "num_experts_per_tok": model.top_k,
        "num_local_experts": model.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": model.norm_eps,  # of LayerNorm, by the name that the original gave it
        "router_aux_loss_coef": router.balance_coef,
        "router_jitter_noise": router.mask_threshold,
    }


def _phi3small(model: ModelConfig, router: RouterConfig) -> dict[str, Any]:
    sparse = model.block_sparse
    has_pattern = sparse.num_local_blocks > 0
    dense_every = sparse.dense_every or None  # null: no layer is dense
    return {
        "attention_dropout_prob": 0.0,
        "blocksparse_block_size": sparse.block_size,
        "blocksparse_homo_head_pattern": sparse.is_same_for_all_heads,
        "blocksparse_num_local_blocks": sparse.num_local_blocks,
        "blocksparse_triton_kernel_block_size": sparse.block_size,
        "blocksparse_vert_stride": sparse.vertical_stride,
        "dense_attention_every_n_layers": dense_every if has_pattern else 1,
        "dummy_token_indices": list(model.masked_tokens),
        "embedding_dropout_prob": model.embedding_dropout,
        "ff_dim_multiplier": None,
        "ff_intermediate_size": model.intermediate_size,
        "ffn_dropout_prob": model.feed_forward_dropout,
        "gegelu_limit": model.gegelu_limit,
        "gegelu_pad_to_256": True,
        "hidden_act": "gegelu",
        "layer_norm_epsilon": model.norm_eps,
        "mup_attn_multiplier": _attention_multiplier(model),
        "mup_embedding_multiplier": model.embedding_multiplier,
        "mup_use_scaling": model.attention_scale is not None,
        "mup_width_multiplier": model.logit_divisor,
        "pad_sequence_to_multiple_of_64": True,
        "reorder_and_upcast_attn": False,
        "rope_position_scale": 1.0,
    }


def _attention_multiplier(model: ModelConfig) -> float:
    """The number that divided by head_dim gives attention_scale, to the last bit if any does."""
    if model.attention_scale is None:
        return 1.0
    guess = model.attention_scale * model.head_dim
    near = (guess, math.nextafter(guess, 0.0), math.nextafter(guess, math.inf))
    return next((n for n in near if n / model.head_dim == model.attention_scale), guess)


def _left_window(model: ModelConfig, window: str) -> int | None:
    if model.sliding_window is None:
        return None
    left = model.sliding_window - (1 if window == "original" else 0)
    if left < 1:
        raise ConfigError(
            f"model.sliding_window: got {model.sliding_window}; config.json counts the keys before "
            "the query, and every reader takes 0 of them for something else. Allowed for an "
            "exported model: null, or 2 and more."
        )
    return left


def _check_held(model: ModelConfig, router: RouterConfig, family: str) -> None:
    fixed = dict(_FIXED[family])
    if family != "phi3small":
        fixed["attention_scale"] = None
    for key, allowed in fixed.items():
        value = getattr(model, key)
        if value != allowed:
            raise _unheld(f"model.{key}", value, family, repr(allowed))
    if family == "phimoe" and router.name != "sparsemixer":
        raise _unheld("router.name", router.name, family, "'sparsemixer'")
    if family != "phi3small" and model.block_sparse.num_local_blocks:
        value = model.block_sparse.num_local_blocks
        raise _unheld("model.block_sparse.num_local_blocks", value, family, "0")
    if model.num_heads * model.head_dim == model.hidden_size:
        return
    # transformers 5 reads head_dim for phi3 too, but checks the factors' lengths without it, and
    # phi-3-small's code has no such key
    if family == "phi3small" or (family == "phi3" and model.rope.long_factor is not None):
        width = model.hidden_size / model.num_heads
        raise _unheld(
            "model.head_dim", model.head_dim, family, f"hidden_size / num_heads = {width:g}"
        )


def _unheld(key: str, value: object, family: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"{key}: got {value!r}; a model of this shape is exported as {family}, whose config.json "
        f"can only say {allowed}. It has no published format; keep it as a run folder."
    )
