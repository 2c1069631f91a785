"""Phi-3-small against its formulas with dense masks: logits, gradients, decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import phi3_small_formulas as formulas
import pytest
import torch
from closeness import FLOAT32_LIMIT, assert_all_close, distance
from phi3_small_formulas import Shape
from torch import Tensor

from moe.model.attention import KeyValueCache
from moe.model.dropout import dropout
from moe.model.transformer import Transformer, build_model
from moe.model_config import BlockSparseConfig, ModelConfig, RopeConfig
from moe.sparse.noise import (
    PURPOSE_EMBEDDING_DROPOUT,
    PURPOSE_FEED_FORWARD_DROPOUT,
    token_keys,
)

SHAPE = Shape()
TWO_HEADS = replace(SHAPE, num_heads=2, num_kv_heads=1, num_layers=2)


def config_of(shape: Shape, *, dropout_share: float = 0.0) -> ModelConfig:
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        num_experts=0,
        norm_eps=shape.layer_norm_epsilon,
        head_bias=False,
        tie_embeddings=True,
        max_position=8192,
        feed_forward="gegelu",
        feed_forward_bias=True,
        gegelu_limit=shape.gegelu_limit,
        attention_scale=shape.mup_attn_multiplier / shape.head_dim,
        embedding_multiplier=shape.mup_embedding_multiplier,
        logit_divisor=shape.mup_width_multiplier,
        masked_tokens=shape.dummy_tokens,
        block_sparse=BlockSparseConfig(
            num_local_blocks=shape.num_local_blocks,
            block_size=shape.block_size,
            vertical_stride=shape.vert_stride,
            is_same_for_all_heads=shape.homo_head_pattern,
            dense_every=shape.dense_attention_every_n_layers,
        ),
        embedding_dropout=dropout_share,
        feed_forward_dropout=dropout_share,
        rope=RopeConfig(
            theta=shape.rope_embedding_base,
            original_max_position=shape.original_max_position,
            short_factor=shape.short_factor,
            long_factor=shape.long_factor,
            short_mscale=shape.short_mscale,
            long_mscale=shape.long_mscale,
        ),
    )


def random_parameters(shape: Shape, *, seed: int = 0) -> dict[str, Tensor]:
    """Float32 numbers, held in float64: the formulas then add no rounding of their own."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, size in formulas.parameter_shapes(shape).items():
        # the embedding times 10 is of size 1; wide queries make attention choose among keys
        scale = {"embed_tokens": 0.1, "query_key_value": 0.4, "up_proj": 0.5}
        value = torch.randn(size, generator=generator)
        value = value * next((s for part, s in scale.items() if part in name), 0.2)
        value = value + 1.0 if "layernorm.weight" in name else value
        parameters[name] = value.double().requires_grad_()
    return parameters


def in_our_names(tensors: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The published layout cut into ours: also of gradients, which move as their parameters do."""
    names = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "feed_forward_norm",
        "self_attn.dense": "attention.output",
        "mlp.down_proj": "feed_forward.down",
    }
    per_group = shape.num_heads // shape.num_kv_heads
    ours = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.removeprefix("model.").rpartition(".")
        if not stem.startswith("layers."):
            ours[f"{ {'embed_tokens': 'embed', 'final_layernorm': 'norm'}[stem] }.{kind}"] = tensor
            continue
        _, layer, rest = stem.split(".", 2)
        if rest == "self_attn.query_key_value":
            heads = tensor.view(
                shape.num_kv_heads, per_group + 2, shape.head_dim, *tensor.shape[1:]
            )
            parts = (heads[:, :per_group], heads[:, per_group], heads[:, per_group + 1])
            for part, piece in zip(("query", "key", "value"), parts, strict=True):
                ours[f"blocks.{layer}.attention.{part}.{kind}"] = piece.reshape(
                    -1, *tensor.shape[1:]
                )
        elif rest == "mlp.up_proj":
            ours[f"blocks.{layer}.feed_forward.gate_up.{kind}"] = torch.cat(
                [tensor[0::2], tensor[1::2]]
            )
        else:
            ours[f"blocks.{layer}.{names[rest]}.{kind}"] = tensor
    return ours


def ours_with(
    parameters: Mapping[str, Tensor], shape: Shape, *, dropout_share: float = 0.0
) -> Transformer:
    model = build_model(config_of(shape, dropout_share=dropout_share))
    target, source = dict(model.named_parameters()), in_our_names(parameters, shape)
    assert set(target) == set(source)
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])
    return model.eval()


def random_tokens(shape: Shape, *, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(shape.vocab_size, (batch, length), generator=generator)


def allowed(logits_BSV: Tensor, shape: Shape) -> Tensor:
    """The logits of tokens that are not masked; the masked ones must be the least number."""
    masked = list(shape.dummy_tokens)
    assert (logits_BSV[..., masked] == torch.finfo(logits_BSV.dtype).min).all()
    kept = [token for token in range(shape.vocab_size) if token not in masked]
    return logits_BSV[..., kept]


CASES = {
    "published": (SHAPE, (1, 63, 64, 65, 1024, 1025)),
    "same-pattern-for-all-heads": (replace(SHAPE, homo_head_pattern=True), (1025,)),
    "heads-fewer-than-the-stride": (replace(TWO_HEADS), (1025, 4096)),
    "all-layers-sparse-but-every-third": (
        replace(SHAPE, dense_attention_every_n_layers=3, block_size=8, num_local_blocks=3), (200,),
    ),
    "attention-multiplier": (replace(SHAPE, mup_attn_multiplier=3.0), (65,)),
    "low-limit": (replace(SHAPE, gegelu_limit=1.0), (65,)),
    "longrope": (
        replace(
            SHAPE, num_layers=2, original_max_position=70, short_factor=(1.0, 1.3),
            long_factor=(1.5, 4.0), short_mscale=1.05, long_mscale=1.19,
        ),
        (70, 71),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "length"),
    [
        pytest.param(shape, length, id=f"{name}-{length}")
        for name, (shape, lengths) in CASES.items()
        for length in lengths
    ],
)
def test_logits_are_those_of_the_formulas(shape, length):
    parameters = random_parameters(shape)
    tokens = random_tokens(shape, batch=2 if length < 100 else 1, length=length)
    with torch.no_grad():
        expected = allowed(formulas.logits(parameters, tokens, shape), shape)
        got = allowed(ours_with(parameters, shape)(tokens).logits, shape)
    assert expected.std() > 0.05
    assert distance(got, expected) < FLOAT32_LIMIT


@pytest.mark.parametrize(
    ("shape", "length"),
    [
        pytest.param(SHAPE, 1, id="one-token"),
        pytest.param(SHAPE, 64, id="one-block"),
        pytest.param(SHAPE, 65, id="two-blocks"),
        pytest.param(replace(SHAPE, num_layers=2), 1025, id="beyond-the-local-blocks"),
        pytest.param(TWO_HEADS, 2000, id="two-heads-far-beyond"),
        pytest.param(CASES["all-layers-sparse-but-every-third"][0], 200, id="small-blocks"),
        pytest.param(CASES["low-limit"][0], 65, id="low-limit"),
    ],
)
def test_gradients_of_every_parameter_are_those_of_the_formulas(shape, length):
    parameters = random_parameters(shape)
    tokens = random_tokens(shape, batch=1, length=length)
    model = ours_with(parameters, shape).train()
    kept = shape.vocab_size - len(shape.dummy_tokens)
    label = torch.randint(kept, (length,), generator=torch.Generator().manual_seed(1))
    for logits in (model(tokens, key_BS=None).logits, formulas.logits(parameters, tokens, shape)):
        torch.nn.functional.cross_entropy(allowed(logits, shape)[0], label).backward()
    expected = {name: _gradient(p) for name, p in parameters.items()}
    got = {name: _gradient(p) for name, p in model.named_parameters()}
    assert_all_close(got, in_our_names(expected, shape))


def test_training_with_dropout_is_that_of_the_formulas_with_the_same_numbers_dropped():
    share, length = 0.1, 65
    parameters = random_parameters(SHAPE)
    tokens = random_tokens(SHAPE, batch=2, length=length)
    key_BS = token_keys(0, torch.tensor([5, 6]), seq_len=length)
    ones = torch.ones(2, length, SHAPE.hidden_size)
    dropped = {
        layer: dropout(ones, key_BS, share=share, layer=layer, purpose=PURPOSE_FEED_FORWARD_DROPOUT)
        for layer in range(SHAPE.num_layers)
    }
    dropped[-1] = dropout(ones, key_BS, share=share, layer=0, purpose=PURPOSE_EMBEDDING_DROPOUT)
    model = ours_with(parameters, SHAPE, dropout_share=share).train()
    kept = SHAPE.vocab_size - len(SHAPE.dummy_tokens)
    label = torch.randint(kept, (2 * length,), generator=torch.Generator().manual_seed(1))
    got = model(tokens, key_BS=key_BS).logits
    expected = formulas.logits(parameters, tokens, SHAPE, dropped=dropped)
    assert distance(allowed(got, SHAPE), allowed(expected, SHAPE)) < FLOAT32_LIMIT
    for logits in (got, expected):
        torch.nn.functional.cross_entropy(allowed(logits, SHAPE).flatten(0, 1), label).backward()
    gradients = {name: _gradient(p) for name, p in parameters.items()}
    ours = {name: _gradient(p) for name, p in model.named_parameters()}
    assert_all_close(ours, in_our_names(gradients, SHAPE))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("pieces", [[64, 1], [63, 1, 1], [1000, 24, 1], [1100, 1, 1]])
def test_decode_steps_are_those_of_the_formulas(pieces):
    parameters, length = random_parameters(SHAPE), sum(pieces)
    tokens = random_tokens(SHAPE, batch=1, length=length)
    model = ours_with(parameters, SHAPE)
    caches = KeyValueCache.empty(
        model.config, batch=1, length=length, device=torch.device("cpu"), dtype=torch.float32
    )
    parts, start = [], 0
    with torch.no_grad():
        expected = allowed(formulas.logits(parameters, tokens, SHAPE), SHAPE)
        for size in pieces:
            part = tokens[:, start : start + size]
            parts.append(allowed(model(part, caches=caches, start=start).logits, SHAPE))
            start += size
    assert distance(torch.cat(parts, dim=1), expected) < FLOAT32_LIMIT


def test_packed_documents_are_each_as_alone():
    shape = replace(SHAPE, block_size=8, num_local_blocks=2, vert_stride=4)
    parameters = random_parameters(shape)
    lengths = ((70, 1, 29), (100,))
    tokens = random_tokens(shape, batch=2, length=100)
    position = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    document = torch.tensor([[k for k, n in enumerate(row) for _ in range(n)] for row in lengths])
    with torch.no_grad():
        got = ours_with(parameters, shape)(tokens, position_BS=position, document_BS=document)
        for row, sizes in enumerate(lengths):
            texts = tokens[row].split(sizes)
            alone = [formulas.logits(parameters, text[None], shape)[0] for text in texts]
            expected = allowed(torch.cat(alone), shape)
            assert distance(allowed(got.logits[row], shape), expected) < FLOAT32_LIMIT


def test_left_padding_leaves_each_text_as_alone_also_in_decode_steps():
    # blocks are counted from the first token of the text, not from the padding
    shape = replace(SHAPE, block_size=8, num_local_blocks=2, vert_stride=4)
    parameters, model = random_parameters(shape), None
    padding_B = torch.tensor([0, 5, 30, 69])
    tokens = random_tokens(shape, batch=4, length=80)
    model = ours_with(parameters, shape)
    caches = KeyValueCache.empty(
        model.config, batch=4, length=80, device=torch.device("cpu"), dtype=torch.float32
    )
    with torch.no_grad():
        parts = [model(tokens[:, :70], padding_B=padding_B, caches=caches).logits]
        parts += [
            model(tokens[:, i : i + 1], padding_B=padding_B, caches=caches, start=i).logits
            for i in range(70, 80)
        ]
        got = torch.cat(parts, dim=1)
        for row, padding in enumerate(padding_B.tolist()):
            expected = formulas.logits(parameters, tokens[row : row + 1, padding:], shape)[0]
            assert (
                distance(allowed(got[row, padding:], shape), allowed(expected, shape))
                < FLOAT32_LIMIT
            )


@pytest.mark.parametrize("same_for_all", [False, True])
def test_sparse_is_dense_up_to_1024_tokens_and_no_longer(same_for_all):
    shape = replace(SHAPE, homo_head_pattern=same_for_all, num_layers=1)
    dense = replace(shape, dense_attention_every_n_layers=1)
    parameters = random_parameters(shape)
    tokens = random_tokens(shape, batch=1, length=1025)
    with torch.no_grad():
        got = allowed(ours_with(parameters, shape)(tokens).logits, shape)[0]
        expected = allowed(ours_with(parameters, dense)(tokens).logits, shape)[0]
    assert distance(got[:1024], expected[:1024]) < FLOAT32_LIMIT
    assert distance(got[1024], expected[1024]) > 1e-3


def test_each_setting_of_the_family_changes_the_logits():
    # or a comparison with the formulas would hold although both ignore the setting
    parameters, tokens = random_parameters(SHAPE), random_tokens(SHAPE, batch=1, length=1100)
    small = replace(SHAPE, block_size=8, num_local_blocks=2)

    def logits(shape: Shape) -> Tensor:
        with torch.no_grad():
            return allowed(ours_with(parameters, shape)(tokens).logits, shape)

    expected = logits(small)
    for changed in (
        replace(small, homo_head_pattern=True),
        replace(small, vert_stride=4),
        replace(small, num_local_blocks=3),
        replace(small, dense_attention_every_n_layers=3),
        replace(small, mup_attn_multiplier=2.0),
        replace(small, mup_embedding_multiplier=5.0),
        replace(small, gegelu_limit=1.0),
        replace(small, rope_embedding_base=1e4),
    ):
        assert distance(logits(changed), expected) > 1e-3
    halved = logits(replace(small, mup_width_multiplier=16.0))
    assert distance(2 * halved, expected) < FLOAT32_LIMIT


def test_bfloat16_keeps_the_logits_to_3_percent():
    # 8 bits: as of a dense model (test_bfloat16.py)
    parameters = random_parameters(SHAPE)
    tokens = random_tokens(SHAPE, batch=1, length=1100)
    model = ours_with(parameters, SHAPE)
    with torch.no_grad():
        expected = allowed(model(tokens).logits, SHAPE)
        got = allowed(model.bfloat16()(tokens).logits, SHAPE).float()
    assert (got - expected).square().mean().sqrt() < 0.03 * expected.std()
    is_same = got.argmax(dim=-1) == expected.argmax(dim=-1)
    assert is_same.float().mean() > 0.95
