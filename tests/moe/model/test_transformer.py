"""The decoder: counts, isolation of documents, cache, recomputation, initialisation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig
from moe.model.attention import KeyValueCache
from moe.model.transformer import build_model
from moe.model_config import BlockSparseConfig, ModelConfig, RopeConfig
from moe.sparse.noise import token_keys

NANO = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    intermediate_size=16, num_experts=16, max_position=64,
    rope=RopeConfig(original_max_position=64),
)  # fmt: skip
DENSE = replace(NANO, num_experts=0, norm="rmsnorm", attention_bias=False, head_bias=False)
# all that distinguishes phi-3-small, with blocks of 3 tokens
SMALL = replace(
    DENSE, num_layers=3, norm="layernorm", attention_bias=True, feed_forward="gegelu",
    feed_forward_bias=True, attention_scale=1 / 8, embedding_multiplier=10.0, logit_divisor=8.0,
    masked_tokens=(5, 63), tie_embeddings=True,
    block_sparse=BlockSparseConfig(num_local_blocks=2, block_size=3, vertical_stride=4),
)  # fmt: skip
DROPPING = replace(SMALL, embedding_dropout=0.2, feed_forward_dropout=0.2)
LONG_ROPE = RopeConfig(
    original_max_position=8, short_factor=(1.0, 1.1, 1.3, 1.7), long_factor=(1.5, 2.0, 3.0, 4.0),
    short_mscale=1.1, long_mscale=1.3,
)  # fmt: skip


def randomised(config, router="sparsemixer", **named):
    """A model whose norms and biases are random too: ones and zeros hide mistakes."""
    model = build_model(config, RouterConfig(name=router), ExpertsConfig("reference"), **named)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("config", [NANO, DENSE, SMALL, replace(NANO, tie_embeddings=True)])
def test_the_counted_parameters_are_the_built_ones(config):
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters()


@pytest.mark.parametrize("config", [NANO, DENSE, SMALL])
def test_documents_of_one_window_do_not_see_each_other(config):
    model = randomised(config).eval()
    first, second = torch.randint(64, (1, 9)), torch.randint(64, (1, 7))
    packed = model(
        torch.cat([first, second], dim=1),
        position_BS=torch.tensor([[*range(9), *range(7)]]),
        document_BS=torch.tensor([[0] * 9 + [1] * 7]),
    ).logits
    alone = torch.cat([model(first).logits, model(second).logits], dim=1)
    assert torch.allclose(packed, alone, atol=1e-5)
    crossing = model(torch.cat([first, second], dim=1)).logits
    assert not torch.allclose(crossing, alone, atol=1e-2)


@pytest.mark.parametrize("config", [NANO, DENSE, SMALL, replace(DENSE, sliding_window=5)])
@pytest.mark.parametrize("pieces", [[12], [7, 5], [5] + [1] * 7])
def test_cached_pieces_give_the_logits_of_one_pass(config, pieces):
    model = randomised(config).eval()
    tokens = torch.randint(64, (2, 12))
    whole = model(tokens).logits
    caches = KeyValueCache.empty(
        config, batch=2, length=12, device=torch.device("cpu"), dtype=torch.float32
    )
    parts, start = [], 0
    for size in pieces:
        parts.append(model(tokens[:, start : start + size], caches=caches, start=start).logits)
        start += size
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=2e-5)


@pytest.mark.parametrize("window", [1, 3, 16])
def test_a_window_counts_the_query_itself(window):
    model = randomised(replace(DENSE, sliding_window=window, num_layers=1)).eval()
    tokens = torch.randint(64, (1, 10))
    before = model(tokens).logits[0, -1]
    for place in range(10):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 64
        is_seen = not torch.equal(model(changed).logits[0, -1], before)
        assert is_seen == (place >= 10 - window)


@pytest.mark.parametrize("config", [NANO, DENSE, DROPPING])
def test_recomputed_activations_give_bitwise_the_same_gradients(config):
    gradients = []
    for recompute in (False, True):
        model = randomised(config, recompute_activations=recompute).train()
        tokens = torch.arange(24).view(2, 12)
        key_BS = token_keys(0, torch.arange(2), seq_len=12)
        output = model(tokens, key_BS=key_BS)
        output.logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_training_draws_depend_on_the_sample_and_not_on_its_place_in_the_batch():
    model = randomised(NANO).train()
    tokens = torch.randint(64, (4, 12))
    key_BS = token_keys(0, torch.tensor([10, 11, 12, 13]), seq_len=12)
    together = model(tokens, key_BS=key_BS)
    alone = model(tokens[2:3], key_BS=token_keys(0, torch.tensor([12]), seq_len=12))
    assert torch.equal(together.routings[1].expert_TK[24:36], alone.routings[1].expert_TK)
    assert torch.allclose(together.logits[2:3], alone.logits, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [NANO, replace(SMALL, embedding_dropout=0.1), replace(SMALL, feed_forward_dropout=0.1)],
)
def test_training_a_model_that_has_noise_without_keys_is_refused(config):
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="key_BS"):
        build_model(config).train()(tokens)
    assert build_model(config).eval()(tokens).logits.isfinite().all()


def test_a_model_without_noise_trains_without_keys():
    model = randomised(SMALL).train()
    tokens = torch.randint(64, (2, 12))
    keys = token_keys(0, torch.arange(2), seq_len=12)
    assert torch.equal(model(tokens).logits, model(tokens, key_BS=keys).logits)


def test_dropout_is_none_in_evaluation_and_the_samples_own_in_training():
    model, plain = randomised(DROPPING), randomised(SMALL)
    tokens = torch.randint(64, (4, 12))
    expected = plain.eval()(tokens).logits
    assert torch.equal(model.eval()(tokens).logits, expected)
    key_BS = token_keys(0, torch.tensor([10, 11, 12, 13]), seq_len=12)
    together = model.train()(tokens, key_BS=key_BS).logits
    assert not torch.allclose(together, expected, atol=1e-2)
    rows = [model(tokens[i : i + 1], key_BS=key_BS[i : i + 1]).logits for i in range(4)]
    assert torch.allclose(torch.cat(rows), together, atol=1e-5)


def test_embedding_dropout_comes_before_the_multiplier():
    # on the embedding's own output: a share of exact zeros, the others 10 / (1 - share) as large
    config = replace(DROPPING, embedding_dropout=0.5)
    model = randomised(config).train()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tokens = torch.randint(64, (2, 12))
    model(tokens, key_BS=token_keys(0, torch.arange(2), seq_len=12))
    is_kept = seen[0] != 0
    assert is_kept.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.allclose(seen[0][is_kept], 20.0 * model.embed(tokens)[is_kept])


def test_masked_tokens_are_never_the_likeliest_and_get_no_gradient():
    model, free = randomised(SMALL), randomised(replace(SMALL, masked_tokens=()))
    tokens = torch.randint(64, (2, 12))
    got, expected = model(tokens).logits, free(tokens).logits
    others = [token for token in range(64) if token not in (5, 63)]
    assert torch.equal(got[..., others], expected[..., others])
    assert (got[..., [5, 63]] == torch.finfo(torch.float32).min).all()
    assert (got.softmax(dim=-1)[..., [5, 63]] == 0).all()
    labels = torch.tensor(others)[torch.arange(24) % len(others)]
    torch.nn.functional.cross_entropy(got.flatten(0, 1), labels).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_tied_embeddings_are_one_tensor_also_after_training_moves_it():
    model = build_model(SMALL)
    assert model.head.weight is model.embed.weight
    names = dict(model.named_parameters())
    assert "head.weight" not in names
    before = model.head.weight.clone()
    model(torch.arange(12)[None]).logits[..., 7].sum().backward()
    with torch.no_grad():
        names["embed.weight"] -= names["embed.weight"].grad
    assert not torch.equal(model.head.weight, before)


@pytest.mark.parametrize("config", [NANO, DENSE, SMALL, replace(DENSE, sliding_window=5)])
def test_left_padding_leaves_a_text_as_it_is_alone(config):
    model = randomised(config).eval()
    tokens, padding_B = torch.randint(64, (3, 14)), torch.tensor([0, 6, 13])
    got = model(tokens, padding_B=padding_B).logits
    assert got.isfinite().all()
    for row, padding in enumerate(padding_B.tolist()):
        alone = model(tokens[row : row + 1, padding:]).logits
        assert torch.allclose(got[row : row + 1, padding:], alone, atol=1e-5)


@pytest.mark.parametrize("config", [NANO, DENSE])
def test_a_rows_logits_do_not_depend_on_its_batch_on_either_side_of_the_original_length(config):
    # the longest row has 12 tokens, beyond the original 8; the others 8, 7 and 1
    model = randomised(replace(config, rope=LONG_ROPE)).eval()
    tokens, padding_B = torch.randint(64, (4, 12)), torch.tensor([0, 4, 5, 11])
    together = model(tokens, padding_B=padding_B).logits
    for row, padding in enumerate(padding_B.tolist()):
        alone = model(tokens[row : row + 1, padding:]).logits
        assert torch.allclose(together[row : row + 1, padding:], alone, atol=1e-5)
    # and the regimes do differ: the same text with the factors of the other side
    other = replace(LONG_ROPE, short_factor=LONG_ROPE.long_factor, short_mscale=1.3)
    as_long = randomised(replace(config, rope=other)).eval()(tokens[1:2, 4:]).logits
    assert not torch.allclose(together[1:2, 4:], as_long, atol=1e-2)


@pytest.mark.parametrize("config", [NANO, DENSE, DROPPING])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_loss_and_its_gradient_do_not_depend_on_the_split_into_micro_batches(config, rows):
    # packed windows of 12: the longest document has 12, 8, 9, 4, 12 and 8 tokens, original 8
    config = replace(config, rope=LONG_ROPE)
    lengths = [[12], [8, 4], [3, 9], [4, 4, 4], [12], [4, 8]]
    document = torch.tensor([[k for k, n in enumerate(row) for _ in range(n)] for row in lengths])
    position = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    tokens = torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(5))
    labels = torch.randint(6, (6, 12), generator=torch.Generator().manual_seed(6)) - 1
    labels = labels.where(labels >= 0, torch.tensor(-100))  # masked_tokens start at 5
    key_BS = token_keys(0, torch.arange(6), seq_len=12)

    def train(size: int):
        model, total = randomised(config).train(), 0.0
        for part in torch.arange(6).split(size):
            logits = model(
                tokens[part], position_BS=position[part], document_BS=document[part],
                key_BS=key_BS[part],
            ).logits  # fmt: skip
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[part].flatten(), reduction="sum"
            )
            loss.backward()
            total += loss.item()
        return total, {name: p.grad for name, p in model.named_parameters()}

    expected, gradient = train(6)
    got, split_gradient = train(rows)
    # float32 sums in another order
    assert got == pytest.approx(expected, rel=1e-6)
    for name, value in gradient.items():
        largest = value.abs().max().clamp(min=1e-3)
        assert (split_gradient[name] - value).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("config", [NANO, SMALL])
@pytest.mark.parametrize("neighbour", [20, 54])
def test_a_short_document_is_computed_the_same_beside_one_beyond_the_original_length(
    config, neighbour
):
    rope = replace(LONG_ROPE, original_max_position=32)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(64, (1, 10 + neighbour + 3), generator=generator)
    lengths, labels = [10, neighbour, 3], tokens.clamp(min=6) % 62  # ids that are not masked
    labels = labels.where(labels > 5, 6)
    document = torch.tensor(
        [[k for k, n in zip((0, 1, -1), lengths, strict=True) for _ in range(n)]]
    )
    position = torch.tensor([[*range(10), *range(neighbour), 0, 0, 0]])

    def gradients(model, logits, labels):
        torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").backward()
        return {name: p.grad for name, p in model.named_parameters()}

    packed, alone = (randomised(replace(config, rope=rope)).eval() for _ in range(2))
    together = packed(tokens, position_BS=position, document_BS=document).logits
    parts = [alone(part).logits for part in tokens[:, :-3].split(lengths[:2], dim=1)]
    # a wrong regime moves these logits by more than 1
    assert torch.allclose(together[:, :-3], torch.cat(parts, dim=1), atol=1e-4)
    got = gradients(packed, together[:, :10], labels[:, :10])
    expected = gradients(alone, parts[0], labels[:, :10])
    for name, value in expected.items():
        largest = value.abs().max().clamp(min=1e-3)
        assert (got[name] - value).abs().max() < 1e-5 * largest, name


def test_padding_behind_a_text_at_position_0_leaves_it_as_it_is_alone():
    model = randomised(replace(NANO, rope=LONG_ROPE)).eval()
    tokens = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(8))
    position = torch.arange(12)[None] * (torch.arange(12) < 6)
    padded = model(tokens, position_BS=position).logits[:, :6]
    assert torch.allclose(padded, model(tokens[:, :6]).logits, atol=1e-5)
    assert not torch.allclose(model(tokens).logits[:, :6], padded, atol=1e-2)


def test_only_the_last_logits_are_computed_when_asked():
    model = randomised(SMALL).eval()
    tokens = torch.randint(64, (2, 12))
    got = model(tokens, last_only=True).logits
    assert got.shape == (2, 1, 64)
    assert torch.allclose(got, model(tokens).logits[:, -1:], atol=1e-6)


def test_every_expert_starts_differently_and_reproducibly():
    one, two, other = build_model(NANO), build_model(NANO), build_model(NANO, seed=1)
    down = one.get_submodule("blocks.0.feed_forward.experts").down
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(down, other.get_submodule("blocks.0.feed_forward.experts").down)
    assert len({tuple(expert.flatten().tolist()) for expert in down}) == 16
    assert down.std().item() == pytest.approx(0.02, rel=0.05)
    for name, parameter in one.named_parameters():
        if name.endswith(".bias"):
            assert parameter.abs().max() == 0
        if "norm.weight" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))


@pytest.mark.parametrize("config", [NANO, DENSE, replace(DENSE, sliding_window=5)])
@pytest.mark.parametrize("start", [0, 4])
def test_the_last_place_alone_has_the_logits_and_the_cache_of_all_places(config, start):
    model = randomised(config).eval()
    tokens, padding_B = torch.randint(64, (2, 12)), torch.tensor([0, 3])
    outputs, memories = [], []
    for last_only in (False, True):
        caches = KeyValueCache.empty(
            config, batch=2, length=12, device=torch.device("cpu"), dtype=torch.float32
        )
        if start:
            model(tokens[:, :start], caches=caches, padding_B=padding_B)
        outputs.append(
            model(
                tokens[:, start:], caches=caches, start=start, padding_B=padding_B,
                last_only=last_only,
            )
        )  # fmt: skip
        memories.append(torch.stack([torch.stack([c.key, c.value]) for c in caches]))
    whole, last = outputs
    assert last.logits.shape == (2, 1, 64)
    assert torch.allclose(whole.logits[:, -1:], last.logits, atol=1e-5)
    assert torch.equal(*memories)
    if config.is_sparse:
        expert_BSK = whole.routings[-1].expert_TK.unflatten(0, (2, -1))
        assert torch.equal(expert_BSK[:, -1], last.routings[-1].expert_TK)


def test_the_last_place_alone_of_packed_documents_sees_its_own_document():
    model = randomised(NANO).eval()
    tokens = torch.randint(64, (1, 12))
    places = {"document_BS": torch.tensor([[0] * 7 + [1] * 5])}
    whole, last = (model(tokens, **places, last_only=only).logits for only in (False, True))
    assert torch.allclose(whole[:, -1:], last, atol=1e-6)
