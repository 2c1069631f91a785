"""transformers' own models on our experts: logits and every gradient as with its eager ones."""

from __future__ import annotations

import copy
import importlib.metadata
import itertools

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
            # one token's attention is 1 whatever query and key are: what they get is rounding
            if num_tokens > 1 or not any(part in key for part in (".q_", ".k_"))
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


def test_a_version_whose_models_take_no_other_name_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.6.1")
    with pytest.raises(ConfigError, match=r"got 5.6.1, .* pip install 'transformers>=5.7'"):
        register()


def test_flags_that_a_version_does_not_set_say_nothing():
    # 5.7 to 5.17 set neither has_post_expert_norm nor _is_expert_parallel
    experts = make("mixtral", "phi_kernels").model.layers[0].mlp.experts
    flags = ("has_post_expert_norm", "_is_expert_parallel", "is_concatenated", "has_gate")
    x = torch.randn(5, 32)
    weights, chosen = torch.rand(5, 2), torch.tensor([[0, 1]] * 5)
    expected = experts(x, chosen, weights)
    for flag in flags:
        vars(experts).pop(flag, None)
    assert torch.equal(experts(x, chosen, weights), expected)
    experts.has_post_expert_norm = True
    with pytest.raises(ConfigError, match="a norm behind each expert"):
        experts(x, chosen, weights)


TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_every_triple_of_types_is_taken_under_autocast_as_the_eager_experts_take_it(autocast):
    experts = make("mixtral", "phi_kernels").model.layers[0].mlp.experts
    chosen = torch.tensor([[0, 1], [2, 5], [5, 0], [3, 4], [1, 2]])
    for of_x, of_weights, of_routing in itertools.product(TYPES, repeat=3):
        outputs, gradients = [], []
        for implementation in ("phi_kernels", "eager"):
            layer = copy.deepcopy(experts).to(of_weights)
            layer.config._experts_implementation = implementation
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(5, 32, generator=generator).to(of_x).requires_grad_()
            routing = torch.rand(5, 2, generator=generator).to(of_routing).requires_grad_()
            with torch.autocast("cpu", autocast):
                y = layer(x, chosen, routing)
            y.float().square().sum().backward()
            leaves = (x, routing, layer.gate_up_proj, layer.down_proj)
            outputs.append(y)
            gradients.append([leaf.grad for leaf in leaves])
        assert outputs[0].dtype == outputs[1].dtype == of_x
        for got, expected in zip(
            [outputs[0], *gradients[0]], [outputs[1], *gradients[1]], strict=True
        ):
            assert got.dtype == expected.dtype
            # three products and the sum over K, each rounded to 8 digits
            distance = (got.double() - expected.double()).norm() / expected.double().norm()
            assert distance < 8 * 2**-8, (of_x, of_weights, of_routing)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_a_sparse_layer_compiles_as_one_graph(mode):
    layer = make("mixtral", "phi_kernels").model.layers[0].mlp
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for num_tokens in (24, 7):
        x = torch.randn(2, num_tokens, 32)
        with mode():
            assert torch.allclose(compiled(x), layer(x), atol=1e-6)
