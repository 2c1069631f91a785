"""transformers' own models on our experts: logits and every gradient as with its eager ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from closeness import assert_all_close

from moe.errors import ConfigError
from moe.in_transformers import experts_forward, register

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(
        **SHAPE, num_local_experts=6, num_experts_per_tok=3
    ),
    "qwen3": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=20, num_experts=10, num_experts_per_tok=4, head_dim=8,
        norm_topk_prob=True,
    ),
    "phimoe": lambda: transformers.PhimoeConfig(
        **SHAPE, num_local_experts=8, num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


def make(name, implementation):
    register()
    torch.manual_seed(0)
    config = CONFIGS[name]()
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation=implementation
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()  # without the routers' own draws


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_logits_and_gradients_are_those_of_the_eager_experts(name, num_tokens):
    tokens = torch.randint(96, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    logits, gradients = [], []
    for implementation in ("phi_kernels", "eager"):
        model = make(name, implementation)
        assert model.config._experts_implementation == implementation
        logits.append(model(tokens).logits)
        logits[-1].float().logsumexp(-1).sum().backward()
        gradients.append({
            key: torch.zeros_like(p) if p.grad is None else p.grad
            for key, p in model.named_parameters()
        })  # fmt: skip
    assert_all_close({"logits": logits[0]}, {"logits": logits[1]})
    assert_all_close(*gradients)


def test_our_experts_really_run():
    model, calls = make("mixtral", "phi_kernels"), []
    table = transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS

    def counted(*arguments):
        calls.append(arguments)
        return experts_forward(*arguments)

    table.register("phi_kernels", counted)
    try:
        model(torch.ones(1, 3, dtype=torch.long))
    finally:
        register()
    assert len(calls) == 2  # one a layer


def test_experts_of_another_kind_are_refused_by_name():
    register()
    config = transformers.GptOssConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation="phi_kernels"
    )
    with pytest.raises(ConfigError, match="GptOssExperts, which has biases"):
        model(torch.ones(1, 3, dtype=torch.long))
