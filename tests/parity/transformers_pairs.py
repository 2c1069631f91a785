"""A model of transformers and ours with the same random parameters, biases and norms included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe.config import ExpertsConfig, RouterConfig
from moe.model.transformer import Transformer, build_model
from moe.model_config import ModelConfig

transformers = pytest.importorskip("transformers")

LAYER_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.output",
    "mlp.router": "feed_forward.router",
    "mlp.experts.gate_up_proj": "feed_forward.experts.gate_up",
    "mlp.experts.down_proj": "feed_forward.experts.down",
    "mlp.gate_up_proj": "feed_forward.gate_up",
    "mlp.down_proj": "feed_forward.down",
}
MODEL_NAMES = {"model.embed_tokens": "embed", "model.norm": "norm", "lm_head": "head"}


class Pair(NamedTuple):
    """Ours and theirs, both in evaluation mode, float32."""

    ours: Transformer
    theirs: Any  # its generated types do not describe it
    config: ModelConfig


def phi3_pair(config: ModelConfig, *, attention_factor: float | None = None, seed: int = 0) -> Pair:
    """Phi3: rmsnorm, no biases; without attention_factor transformers computes LongRoPE's own."""
    rope = _rope_parameters(config)
    rope["partial_rotary_factor"] = config.rope.rotary_fraction
    if attention_factor is not None:
        rope["attention_factor"] = attention_factor
    theirs = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **_shared(config),
            original_max_position_embeddings=config.rope.original_max_position,
            rope_parameters=rope,
        )
    )
    return _with_same_parameters(config, RouterConfig(), ExpertsConfig(), theirs, seed=seed)


def phimoe_pair(
    config: ModelConfig, router: RouterConfig, *, seed: int = 0, backend: str = "auto"
) -> Pair:
    """Phimoe: layernorm, SparseMixer; its router_jitter_noise is our mask_threshold."""
    rope = _rope_parameters(config)
    if rope["rope_type"] == "longrope":
        rope |= {"short_mscale": config.rope.short_mscale, "long_mscale": config.rope.long_mscale}
    theirs = transformers.PhimoeForCausalLM(
        transformers.PhimoeConfig(
            **_shared(config),
            num_local_experts=config.num_experts,
            attention_bias=config.attention_bias,
            lm_head_bias=config.head_bias,
            router_jitter_noise=router.mask_threshold,
            input_jitter_noise=router.input_jitter,
            rope_parameters=rope,
        )
    )
    return _with_same_parameters(config, router, ExpertsConfig(backend), theirs, seed=seed)


def in_our_names(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename transformers' parameters, or their gradients, and cut the joined projections."""
    ours: dict[str, Tensor] = {}
    width_q, width_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for name, tensor in tensors.items():
        stem, dot, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            stem, dot, kind = name, "", ""
        if stem in MODEL_NAMES:
            ours[f"{MODEL_NAMES[stem]}.{kind}"] = tensor
            continue
        _, _, layer, rest = stem.split(".", 3)
        if rest == "self_attn.qkv_proj":
            parts = tensor.split([width_q, width_kv, width_kv])
            for part, piece in zip(("query", "key", "value"), parts, strict=True):
                ours[f"blocks.{layer}.attention.{part}.{kind}"] = piece
        else:
            ours[f"blocks.{layer}.{LAYER_NAMES[rest]}{dot}{kind}"] = tensor
    return ours


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name; a tied one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; each must have one."""
    return {name: _not_none(name, p.grad) for name, p in model.named_parameters()}


def next_token_loss(logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    """The mean cross-entropy of each token given those before it."""
    return functional.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())


def greedy(pair: Pair, prompt_BS: Tensor, *, num_new: int) -> tuple[Tensor, Tensor]:
    """The likeliest token, num_new times, (B, S + num_new): ours without a cache, each time over
    the whole text; and transformers' own generate."""
    tokens = prompt_BS
    with torch.no_grad():
        for _ in range(num_new):
            chosen = pair.ours(tokens, last_only=True).logits.argmax(dim=-1)
            tokens = torch.cat([tokens, chosen], dim=1)
        expected = pair.theirs.generate(
            prompt_BS, attention_mask=torch.ones_like(prompt_BS), max_new_tokens=num_new,
            do_sample=False,
        )  # fmt: skip
    return tokens, expected


def random_tokens(config: ModelConfig, *, batch: int, length: int, seed: int = 3) -> Tensor:
    """Token ids (batch, length), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length), generator=generator)


def randomise(model: nn.Module, *, seed: int) -> None:
    """Fill every parameter from the seed, norms around 1: ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            if "norm.weight" in name:
                parameter.add_(1.0)


def _with_same_parameters(
    config: ModelConfig,
    router: RouterConfig,
    experts: ExpertsConfig,
    theirs: nn.Module,
    *,
    seed: int,
) -> Pair:
    randomise(theirs, seed=seed)
    ours = build_model(config, router, experts)
    target, source = parameters(ours), in_our_names(parameters(theirs), config)
    assert set(target) == set(source)
    for name, tensor in target.items():
        tensor.copy_(source[name])
    return Pair(ours.eval(), theirs.eval(), config)


def _shared(config: ModelConfig) -> dict[str, Any]:
    assert config.head_dim * config.num_heads == config.hidden_size  # Phi3Config derives it
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    if rope.short_factor is None or rope.long_factor is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {
        "rope_type": "longrope",
        "rope_theta": rope.theta,
        "short_factor": list(rope.short_factor),
        "long_factor": list(rope.long_factor),
        "original_max_position_embeddings": rope.original_max_position,
    }


def _not_none(name: str, gradient: Tensor | None) -> Tensor:
    assert gradient is not None, name
    return gradient
