"""Which keys a query sees: windows to the very edge, documents, padding, layers by pattern."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe.model.attention import (
    Attention,
    KeyValueCache,
    Visibility,
    attend_by_blocks,
    attend_densely,
    attention_mask,
    attention_segments,
    visibility,
)
from moe.model_config import BlockSparseConfig, ModelConfig, RopeConfig

CONFIG = ModelConfig(
    vocab_size=16, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    intermediate_size=8, num_experts=0, max_position=64, rope=RopeConfig(original_max_position=64),
)  # fmt: skip
BLOCKS = replace(
    CONFIG, block_sparse=BlockSparseConfig(num_local_blocks=2, block_size=3, vertical_stride=4)
)
CPU = torch.device("cpu")


def attention_of(config: ModelConfig, *, layer: int = 0) -> Attention:
    """Random, and small enough that no probability is lost in the rounding of a sum."""
    module = Attention(config, layer=layer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def no_rotation(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    return torch.ones(1, length, config.head_dim), torch.zeros(1, length, config.head_dim)


# config.json's number is FlashAttention's left window w: a query at place q sees q - w to q, which
# are w + 1 keys, and ModelConfig.sliding_window counts keys
@pytest.mark.parametrize("left_window", [0, 1, 6, 7, 18])
def test_place_q_minus_w_is_seen_and_the_one_before_it_is_not_at_prefill(left_window):
    config = replace(CONFIG, sliding_window=left_window + 1)
    module, length = attention_of(config), 20
    x = torch.randn(1, length, config.hidden_size, generator=torch.Generator().manual_seed(1))
    visible = visibility(
        config, num_queries=length, num_keys=length, document_BS=None, padding_B=None, device=CPU
    )
    before = module(x, no_rotation(config, length), visibility=visible)
    for key in range(length):
        changed = x.clone()
        changed[0, key] += 1.0
        after = module(changed, no_rotation(config, length), visibility=visible)
        moved = (after != before).any(dim=-1)[0]
        expected = [query - left_window <= key <= query for query in range(length)]
        assert moved.tolist() == expected


@pytest.mark.parametrize("left_window", [0, 1, 6, 18, 19])
def test_place_q_minus_w_is_seen_and_the_one_before_it_is_not_at_a_decode_step(left_window):
    config = replace(CONFIG, sliding_window=left_window + 1)
    module, length = attention_of(config), 20
    generator = torch.Generator().manual_seed(1)
    query = length - 1
    x = torch.randn(1, 1, config.hidden_size, generator=generator)
    [cache, _] = KeyValueCache.empty(
        config, batch=1, length=length, device=CPU, dtype=torch.float32
    )
    cache.key.copy_(torch.randn(cache.key.shape, generator=generator))
    cache.value.copy_(torch.randn(cache.value.shape, generator=generator))
    visible = visibility(
        config, num_queries=1, num_keys=length, document_BS=None, padding_B=None, device=CPU
    )

    def step() -> Tensor:
        return module(x, no_rotation(config, 1), visibility=visible, cache=cache, start=query)

    before = step()
    for key in range(query):
        kept = cache.value[:, :, key].clone()
        cache.value[:, :, key] += 1.0
        assert torch.equal(step(), before) == (key < query - left_window)
        cache.value[:, :, key] = kept


def test_the_released_number_shows_2048_keys():
    # 2047 in config.json, 2048 of ModelConfig: the first query that loses a key is number 2048
    mask = attention_mask(
        num_queries=4096, num_keys=4096, document_BS=None, padding_B=None, window=2048, device=CPU
    )
    assert mask is not None
    count = mask[0, 0].sum(dim=-1)
    assert torch.equal(count, torch.arange(1, 4097).clamp(max=2048))
    assert mask[0, 0, 2047, 0]
    assert not mask[0, 0, 2048, 0]


@pytest.mark.parametrize("num_queries", [1, 4, 9])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
@pytest.mark.parametrize("padding", [None, (0, 3, 8)])
def test_the_mask_is_the_rule_stated_for_each_pair(num_queries, window, padding):
    num_keys, start = 9, 9 - num_queries
    document = [[0] * 4 + [1] * 5, [0] * 9, [0, 1, 2, 3, 4, 5, 6, 7, 7]]
    is_packed = num_queries == num_keys and padding is None
    mask = attention_mask(
        num_queries=num_queries,
        num_keys=num_keys,
        document_BS=torch.tensor(document) if is_packed else None,
        padding_B=None if padding is None else torch.tensor(padding),
        window=window,
        device=CPU,
    )
    if mask is None:  # plain causal attention: all that is at or before the query
        mask = torch.ones(num_keys, num_keys, dtype=torch.bool).tril()[start:]
    mask = mask.expand(3, 1, num_queries, num_keys)
    for row, query, key in itertools.product(range(3), range(start, num_keys), range(num_keys)):
        first = 0 if padding is None else padding[row]
        is_seen = key <= query and (window is None or query - key < window)
        is_seen &= not is_packed or document[row][key] == document[row][query]
        is_seen &= key >= first
        is_seen |= key == query  # padding sees itself
        assert mask[row, 0, query - start, key].item() == is_seen


def test_segments_are_the_texts_with_their_own_queries_and_keys():
    document = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 5, 5, 5, 5]])
    found = attention_segments(num_queries=6, num_keys=6, document_BS=document, padding_B=None)
    texts = [(part.row, part.queries, part.keys) for part in found]
    bounds = [(0, 0, 3), (0, 3, 4), (0, 4, 6), (1, 0, 6)]
    assert texts == [(row, slice(a, b), slice(a, b)) for row, a, b in bounds]
    # two queries after four cached places: padding of a row is over, and makes no segment
    found = attention_segments(
        num_queries=2, num_keys=6, document_BS=None, padding_B=torch.tensor([0, 3, 5])
    )
    texts = [(part.row, part.queries, part.keys) for part in found]
    assert texts == [
        (0, slice(0, 2), slice(0, 6)),
        (1, slice(0, 2), slice(3, 6)),
        (2, slice(0, 1), slice(0, 5)),
        (2, slice(1, 2), slice(5, 6)),
    ]


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_alternate_between_the_pattern_and_dense_attention(layer):
    # the pattern hides keys of a text of 20 from some queries; layer 1 shows them all
    module, length = attention_of(BLOCKS, layer=layer), 20
    x = torch.randn(1, length, 16, generator=torch.Generator().manual_seed(1))
    visible = visibility(
        BLOCKS, num_queries=length, num_keys=length, document_BS=None, padding_B=None, device=CPU
    )
    got = module(x, no_rotation(BLOCKS, length), visibility=visible)
    dense = attention_of(CONFIG)
    expected = dense(x, no_rotation(CONFIG, length), visibility=Visibility(None, ()))
    assert torch.allclose(got[:, :6], expected[:, :6], atol=1e-5)  # two local blocks of 3
    assert torch.allclose(got, expected, atol=1e-5) == (layer == 1)


@pytest.mark.parametrize(
    ("document", "padding"),
    [([[0] * 7 + [1] * 1 + [2] * 12, [0] * 20], None), (None, (0, 7)), (None, (19, 13))],
)
def test_texts_of_a_row_attend_by_blocks_as_each_alone(document, padding):
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 4, 20, 4, generator=generator)
    key, value = torch.randn(2, 2, 2, 20, 4, generator=generator)
    visible = visibility(
        BLOCKS, num_queries=20, num_keys=20,
        document_BS=None if document is None else torch.tensor(document),
        padding_B=None if padding is None else torch.tensor(padding), device=CPU,
    )  # fmt: skip
    attend = attend_by_blocks(BLOCKS)
    got = attend(query, key, value, visible)
    for row in range(2):
        cuts = [0, 20]
        if document is not None:
            cuts += [i for i in range(1, 20) if document[row][i] != document[row][i - 1]]
        if padding is not None:
            cuts.append(padding[row])
        for start, end in itertools.pairwise(sorted(set(cuts))):
            alone = visibility(
                BLOCKS, num_queries=end - start, num_keys=end - start, document_BS=None,
                padding_B=None, device=CPU,
            )  # fmt: skip
            place = (slice(row, row + 1), slice(None), slice(start, end))
            expected = attend(query[place], key[place], value[place], alone)
            assert torch.allclose(got[place], expected, atol=1e-6)


@pytest.mark.parametrize("make", [attend_densely, attend_by_blocks])
def test_the_scale_is_the_configured_one(make):
    # with one value 1 and the others 0 the output is a probability; two keys, scores 0 and 4 scale
    query = torch.tensor([[0.0] * 4, [1.0] * 4]).expand(1, 4, 2, 4)
    key = torch.tensor([[0.0] * 4, [1.0] * 4]).expand(1, 2, 2, 4)
    value = torch.tensor([[0.0] * 4, [1.0] * 4]).expand(1, 2, 2, 4)
    for scale, expected_scale in ((None, 0.5), (0.25, 0.25), (1 / 128, 1 / 128)):
        config = replace(BLOCKS, attention_scale=scale)
        visible = visibility(
            config, num_queries=2, num_keys=2, document_BS=None, padding_B=None, device=CPU
        )
        got = make(config)(query, key, value, visible)[0, 0, 1, 0].item()
        assert got == pytest.approx(torch.tensor(4 * expected_scale).sigmoid().item(), rel=1e-5)
