"""Logits and gradients against transformers on small random models, every parameter randomised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig
from moe.model.transformer import build_model
from moe.model_config import ModelConfig, RopeConfig
from moe.sparse.losses import load_balance_pooled
from moe.sparse.router import Routing

transformers = pytest.importorskip("transformers")

MOE = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=24, num_experts=16, max_position=64,
    rope=RopeConfig(
        original_max_position=64, short_factor=(1.0, 1.1, 1.3, 1.7),
        long_factor=(1.5, 2.0, 3.0, 4.0), short_mscale=1.243163121016122,
        long_mscale=1.243163121016122,
    ),
)  # fmt: skip
DENSE = replace(
    MOE, num_experts=0, norm="rmsnorm", attention_bias=False, head_bias=False,
    rope=RopeConfig(original_max_position=64),
)  # fmt: skip


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def copy_into(ours, theirs, config):
    """Copy a transformers Phimoe or Phi3 model's parameters into ours; all of both are used."""
    source = dict(theirs.named_parameters())
    target = dict(ours.named_parameters())

    def move(name, tensor):
        with torch.no_grad():
            target.pop(name).copy_(tensor)

    for name in list(source):
        tensor, key = source[name], name.removeprefix("model.")
        parts = key.split(".")
        if parts[0] == "layers":
            prefix, rest = f"blocks.{parts[1]}", ".".join(parts[2:])
            kind = parts[-1]
            if rest.startswith(("input_layernorm", "post_attention_layernorm")):
                norm = "attention_norm" if rest.startswith("input") else "feed_forward_norm"
                move(f"{prefix}.{norm}.{kind}", tensor)
            elif rest == "self_attn.qkv_proj.weight":
                width_q, width_kv = (
                    config.num_heads * config.head_dim,
                    config.num_kv_heads * config.head_dim,
                )
                for part, piece in zip(
                    ("query", "key", "value"),
                    tensor.split([width_q, width_kv, width_kv]),
                    strict=True,
                ):
                    move(f"{prefix}.attention.{part}.weight", piece)
            elif rest.startswith("self_attn."):
                part = {"q": "query", "k": "key", "v": "value", "o": "output"}[parts[3][0]]
                move(f"{prefix}.attention.{part}.{kind}", tensor)
            else:
                ending = {
                    "mlp.router.weight": "router.weight",
                    "mlp.experts.gate_up_proj": "experts.gate_up",
                    "mlp.experts.down_proj": "experts.down",
                    "mlp.gate_up_proj.weight": "gate_up.weight",
                    "mlp.down_proj.weight": "down.weight",
                }[rest]
                move(f"{prefix}.feed_forward.{ending}", tensor)
        else:
            move(key.replace("embed_tokens", "embed").replace("lm_head", "head"), tensor)
    assert not target


def make_pair(config):
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "attn_implementation": "eager",
    }
    if config.is_sparse:
        rope = config.rope
        theirs = transformers.PhimoeForCausalLM(
            transformers.PhimoeConfig(
                **shared, num_local_experts=16, attention_bias=True, lm_head_bias=True,
                router_jitter_noise=0.01, input_jitter_noise=0.0,
                rope_parameters={
                    "rope_type": "longrope", "rope_theta": rope.theta,
                    "short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor),
                    "short_mscale": rope.short_mscale, "long_mscale": rope.long_mscale,
                    "original_max_position_embeddings": rope.original_max_position,
                },
            )
        )  # fmt: skip
    else:
        theirs = transformers.Phi3ForCausalLM(
            transformers.Phi3Config(
                **shared, original_max_position_embeddings=config.rope.original_max_position,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            )
        )  # fmt: skip
    randomise(theirs)
    ours = build_model(config, RouterConfig(), ExpertsConfig("reference"))
    copy_into(ours, theirs, config)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize(
    "config",
    [MOE, DENSE, replace(DENSE, num_kv_heads=4), replace(DENSE, sliding_window=7)],
    ids=["moe", "dense-gqa", "dense-mha", "dense-window"],
)
def test_logits_agree_in_float32(config):
    ours, theirs = make_pair(config)
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens).logits
    assert expected.std() > 0.5  # a model that says something
    assert (expected - got).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("config", [MOE, DENSE], ids=["moe", "dense"])
def test_evaluation_gradients_of_every_parameter_agree(config):
    ours, theirs = make_pair(config)
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(4))
    for model in (ours, theirs):
        logits = model(tokens).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ).backward()
    with torch.no_grad():  # theirs' gradients, renamed as the parameters were
        gradients = {name: p.grad for name, p in theirs.named_parameters()}
        for name, parameter in theirs.named_parameters():
            parameter.copy_(
                gradients[name] if gradients[name] is not None else torch.zeros_like(parameter)
            )
    renamed = build_model(config)
    copy_into(renamed, theirs, config)
    for (name, p), (_, expected) in zip(
        ours.named_parameters(), renamed.named_parameters(), strict=True
    ):
        scale = expected.abs().max().clamp(min=1e-3)
        assert (p.grad - expected).abs().max() < 1e-4 * scale, name


def test_the_pooled_balance_loss_is_that_of_transformers_with_padding():
    from transformers.models.phimoe.modeling_phimoe import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2 * 10, 16, generator=generator) for _ in range(3)]
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    expected = load_balancing_loss_func(tuple(layers), 16, top_k=2, attention_mask=mask)
    routings = [Routing(torch.ones(20, 2), logit.topk(2).indices, logit) for logit in layers]
    got = load_balance_pooled(routings, mask.flatten().bool())
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
