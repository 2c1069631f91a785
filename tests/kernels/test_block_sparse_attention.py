"""Block-sparse attention: its pattern by hand, its probabilities and gradients by dense masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phi_kernels import BlockPattern, block_sparse_attention, reference
from torch import Tensor

PUBLISHED = BlockPattern(
    block_size=64, num_local_blocks=16, vertical_stride=8, is_same_for_all_heads=False
)
LENGTHS = (1, 63, 64, 65, 1024, 1025, 4096)
# float32: one rounding is 6e-8, a probability or gradient is some tens of them after another
LIMIT = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The matrices are small: on a busy machine several threads only wait for each other."""
    torch.set_num_threads(1)


def sees(pattern: BlockPattern, *, head: int, num_heads: int, query: int, key: int) -> bool:
    """The rule in Python's integers, as the released model states it."""
    step = max(1, int(pattern.vertical_stride / num_heads))
    step = 0 if pattern.is_same_for_all_heads else step
    query_block, key_block = query // pattern.block_size, key // pattern.block_size
    if query < key:
        return False
    if query_block - key_block < pattern.num_local_blocks:
        return True
    return (key_block + head * step + 1) % pattern.vertical_stride == 0


def mask_of(pattern: BlockPattern, *, head: int, num_heads: int, length: int) -> Tensor:
    """Bool (length, length): the rule by blocks, then cut to the past."""
    size = pattern.block_size
    num_blocks = math.ceil(length / size)
    by_block = torch.tensor(
        [
            [
                sees(
                    pattern, head=head, num_heads=num_heads, query=i * size + size - 1, key=j * size
                )
                for j in range(num_blocks)
            ]
            for i in range(num_blocks)
        ]
    )
    by_place = by_block.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1)
    return by_place[:length, :length].tril()


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (B, H, S, C) and probabilities (B, H, S, K), head by head, with dense masks."""
    num_heads, num_queries, num_keys = query.shape[1], query.shape[2], key.shape[2]
    per_group = num_heads // key.shape[1]
    probabilities = []
    for head in range(num_heads):
        mask = mask_of(pattern, head=head, num_heads=num_heads, length=num_keys)
        score = scale * query[:, head] @ key[:, head // per_group].transpose(1, 2)
        score = score.masked_fill(~mask[num_keys - num_queries :], -math.inf)
        probabilities.append(score.softmax(dim=-1))
    outs = [p @ value[:, head // per_group] for head, p in enumerate(probabilities)]
    return torch.stack(outs, dim=1), torch.stack(probabilities, dim=1)


def random_inputs(
    *, batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = 2.0 * torch.randn(batch, heads, queries, width, generator=generator)
    key, value = torch.randn(2, batch, kv_heads, keys, width, generator=generator)
    return query, key, value


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest number; a gradient may be 0 throughout, with one key."""
    largest = expected.abs().max().item()
    difference = (got - expected).abs().max().item()
    return difference / largest if largest > 0 else difference


@pytest.mark.parametrize("length", LENGTHS)
def test_probabilities_are_those_of_dense_masks(length):
    # an identity as values gives the probabilities themselves; at 4,096 of the last 200 queries,
    # which begin inside a block and end one
    num_queries = length if length <= 1025 else 200
    query, key, _ = random_inputs(
        batch=1, heads=2, kv_heads=1, queries=num_queries, keys=length, width=8
    )
    identity = torch.eye(length).expand(1, 1, -1, -1)
    with torch.no_grad():
        got = block_sparse_attention(query, key, identity, pattern=PUBLISHED, scale=0.5)
        _, expected = dense_attention(query, key, identity, PUBLISHED, 0.5)
    assert (got - expected).abs().max() < LIMIT
    assert torch.equal(got > 0, expected > 0)  # not one key more or less
    assert got.sum(dim=-1).sub(1).abs().max() < LIMIT


@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_gradients_are_those_of_dense_masks(length):
    num_heads = 8 if length <= 1025 else 2
    inputs = random_inputs(
        batch=1, heads=num_heads, kv_heads=num_heads // 2, queries=length, keys=length, width=8
    )
    towards = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    results = []
    for attend in (
        lambda q, k, v: block_sparse_attention(q, k, v, pattern=PUBLISHED, scale=1 / 8),
        lambda q, k, v: dense_attention(q, k, v, PUBLISHED, 1 / 8)[0],
    ):
        leaves = [part.clone().requires_grad_() for part in inputs]
        out = attend(*leaves)
        out.backward(towards)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        assert distance(got, expected) < LIMIT


@pytest.mark.parametrize("length", LENGTHS)
def test_a_decode_step_is_the_last_row_of_the_whole_text(length):
    query, key, value = random_inputs(
        batch=2, heads=8, kv_heads=2, queries=1, keys=length, width=8, seed=length
    )
    with torch.no_grad():
        got = block_sparse_attention(query, key, value, pattern=PUBLISHED, scale=0.5)
        place = torch.arange(length)
        for head in range(8):
            mask = mask_of(PUBLISHED, head=head, num_heads=8, length=length)[-1]
            score = 0.5 * key[:, head // 4] @ query[:, head, 0, :, None]
            weight = score[..., 0].masked_fill(~mask, -math.inf).softmax(dim=-1)
            expected = (weight[:, None] @ value[:, head // 4])[:, 0]
            assert distance(got[:, head, 0], expected) < LIMIT, place[mask]


def test_sparse_is_dense_up_to_1024_tokens_and_then_only_where_the_pattern_says_so():
    query, key, value = random_inputs(
        batch=1, heads=8, kv_heads=8, queries=1025, keys=1025, width=8
    )
    with torch.no_grad():
        got = block_sparse_attention(query, key, value, pattern=PUBLISHED, scale=0.5)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.5
        )
    assert distance(got[:, :, :1024], expected[:, :, :1024]) < LIMIT
    # query 1024 is in block 16, from which block 0 is no longer local: only the head whose phase
    # is 7 keeps it, as 0 + 7 + 1 is a multiple of 8
    far = [(got[0, h, 1024] - expected[0, h, 1024]).abs().max().item() for h in range(8)]
    assert far[7] < LIMIT
    assert min(far[:7]) > 1e-4


@pytest.mark.parametrize("num_heads", [1, 2, 3, 5, 8, 12, 32])
@pytest.mark.parametrize("is_same_for_all_heads", [False, True])
def test_every_head_sees_its_own_columns(num_heads, is_same_for_all_heads):
    pattern = BlockPattern(2, 3, 8, is_same_for_all_heads)
    length = 64
    identity = torch.eye(length).expand(1, num_heads, -1, -1)
    zero = torch.zeros(1, num_heads, length, 4)
    with torch.no_grad():  # equal scores: each visible key gets the same probability
        got = block_sparse_attention(zero, zero, identity, pattern=pattern, scale=1.0)[0] > 0
    for head in range(num_heads):
        expected = [
            [
                sees(pattern, head=head, num_heads=num_heads, query=query, key=key)
                for key in range(length)
            ]
            for query in range(length)
        ]
        assert got[head].tolist() == expected
    columns = {tuple(head[-1].tolist()) for head in got}
    assert len(columns) == (1 if is_same_for_all_heads else min(num_heads, 8))


def test_the_published_model_gives_its_32_heads_all_8_phases_4_times():
    groups = PUBLISHED.heads_by_phase(32)
    assert groups == {phase: [phase, phase + 8, phase + 16, phase + 24] for phase in range(8)}
    # the four query heads of a key head have four phases
    assert {head: phase for phase, heads in groups.items() for head in heads if head < 4} == {
        0: 0, 1: 1, 2: 2, 3: 3,
    }  # fmt: skip


def test_the_share_of_causal_pairs_is_that_of_the_published_sizes():
    # the density of the pattern, counted in blocks of all 32 heads: 0.775 at 2k, 0.329 at 8k
    for length, expected in ((2048, 0.775), (8192, 0.329)):
        num_blocks = length // 64
        pairs = [
            sees(PUBLISHED, head=head, num_heads=32, query=i * 64, key=j * 64)
            for head in range(8)
            for i in range(num_blocks)
            for j in range(i + 1)
        ]
        assert sum(pairs) / len(pairs) == pytest.approx(expected, abs=0.001)
        block = torch.arange(num_blocks) * 64
        shown = [
            PUBLISHED.sees(block[:, None], block[None, :], phase=phase).sum().item()
            for phase in range(8)
        ]
        assert sum(shown) == sum(pairs)


patterns = st.builds(
    BlockPattern,
    block_size=st.integers(1, 300),
    num_local_blocks=st.integers(1, 6),
    vertical_stride=st.integers(1, 9),
    is_same_for_all_heads=st.booleans(),
) | st.builds(  # small blocks: many of them in a short text
    BlockPattern,
    block_size=st.integers(1, 16),
    num_local_blocks=st.integers(1, 4),
    vertical_stride=st.integers(1, 9),
    is_same_for_all_heads=st.booleans(),
)


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(
    pattern=patterns,
    kv_heads=st.integers(1, 3),
    per_group=st.integers(1, 4),
    keys=st.integers(1, 700),
    share=st.floats(0, 1),
)
def test_fast_is_the_reference_for_any_pattern(pattern, kv_heads, per_group, keys, share):
    queries = max(1, round(share * keys))
    inputs = random_inputs(
        batch=2, heads=kv_heads * per_group, kv_heads=kv_heads, queries=queries, keys=keys, width=4,
        seed=keys,
    )  # fmt: skip
    results = []
    for attend in (block_sparse_attention, reference.block_sparse_attention):
        leaves = [part.clone().requires_grad_() for part in inputs]
        out = attend(*leaves, pattern=pattern, scale=0.7)
        out.square().sum().backward()
        with torch.no_grad():
            assert torch.equal(attend(*leaves, pattern=pattern, scale=0.7), out)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max().clamp(min=1e-3)  # one visible key: no gradient of its score
        assert (got - expected).abs().max() < LIMIT * scale


def test_the_reference_is_the_dense_masks_in_float64():
    pattern = BlockPattern(4, 2, 3, False)
    query, key, value = (
        part.double()
        for part in random_inputs(batch=2, heads=6, kv_heads=2, queries=29, keys=50, width=4)
    )
    got = reference.block_sparse_attention(query, key, value, pattern=pattern, scale=0.3)
    expected, _ = dense_attention(query, key, value, pattern, 0.3)
    assert distance(got, expected) < 1e-14


def test_bfloat16_stays_within_two_roundings():
    # probabilities and the output keep 8 bits: at most 0.4 % of the largest number each
    inputs = random_inputs(batch=1, heads=4, kv_heads=2, queries=1100, keys=1100, width=16)
    query, key, value = (part.bfloat16() for part in inputs)
    with torch.no_grad():
        got = block_sparse_attention(query, key, value, pattern=PUBLISHED, scale=0.25)
        expected, _ = dense_attention(query.double(), key.double(), value.double(), PUBLISHED, 0.25)
    assert got.dtype == torch.bfloat16
    assert distance(got.double(), expected) < 0.01
