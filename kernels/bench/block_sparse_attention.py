"""Phi-3-small's block-sparse attention against dense causal attention, as ratios within one run.

usage: python kernels/bench/block_sparse_attention.py [--repeats 5] [--flex]

32 heads of 128 on 8 key heads, blocks of 64, 16 local, every 8th beyond. `density` is the share of
the causal pairs that the pattern shows: what the ratio would be if nothing else cost time. --flex
adds torch's FlexAttention, compiled with the same block mask (needs a C++ compiler on a CPU).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from phi_kernels import BlockPattern, block_sparse_attention

HEADS, KV_HEADS, WIDTH = 32, 8, 128
PATTERN = BlockPattern(64, 16, 8, False)
LENGTHS = (1024, 2048, 4096, 8192)
SCALE = 1 / WIDTH


def main() -> None:
    """Print one line for each length and dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flex", action="store_true")
    arguments = parser.parse_args()
    print(f"{'dtype':<10}{'tokens':>7}{'density':>9}{'dense ms':>10}{'ours ms':>9}{'ratio':>7}"
          f"{'flex ms':>9}{'ratio':>7}")  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS:
            print(line(dtype, length, arguments.repeats, with_flex=arguments.flex), flush=True)


def line(dtype: torch.dtype, length: int, repeats: int, *, with_flex: bool) -> str:
    """Time each variant in turns; ratios are medians over the rounds."""
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(1, heads, length, WIDTH, generator=generator).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    variants: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
        ),
        "ours": lambda: block_sparse_attention(query, key, value, pattern=PATTERN, scale=SCALE),
    }
    if with_flex:
        mask, compiled = flex_mask(length), torch.compile(flex_attention)
        variants["flex"] = lambda: compiled(
            query, key, value, block_mask=mask, scale=SCALE, enable_gqa=True
        )
    with torch.inference_mode():
        outputs = {name: run().float() for name, run in variants.items()}  # and warm up
        if with_flex and (outputs["flex"] - outputs["ours"]).abs().max() > 0.05:
            raise SystemExit("flex and ours differ")
        rounds = [{name: clock(run) for name, run in variants.items()} for _ in range(repeats)]
    middle = {name: statistics.median(r[name] for r in rounds) for name in variants}
    ratio = {name: statistics.median(r[name] / r["dense"] for r in rounds) for name in variants}
    text = (
        f"{str(dtype).removeprefix('torch.'):<10}{length:>7}{density(length):>9.3f}"
        f"{1e3 * middle['dense']:>10.1f}{1e3 * middle['ours']:>9.1f}{ratio['ours']:>7.2f}"
    )
    return text + (f"{1e3 * middle['flex']:>9.1f}{ratio['flex']:>7.2f}" if with_flex else "")


def density(length: int) -> float:
    """Share of the causal pairs that are seen, over all heads."""
    place = torch.arange(length)
    seen = sum(
        len(heads) * int(PATTERN.sees(place[:, None], place[None, :], phase=phase).sum())
        for phase, heads in PATTERN.heads_by_phase(HEADS).items()
    )
    return seen / (HEADS * length * (length + 1) / 2)


def flex_mask(length: int) -> BlockMask:
    """The pattern as FlexAttention's lists of blocks: its own search would hold H x S x S."""
    size = PATTERN.block_size
    blocks = torch.arange(-(-length // size))
    first = blocks * size
    seen = torch.stack([
        PATTERN.sees(first[:, None], first[None, :], phase=head % PATTERN.vertical_stride)
        for head in range(HEADS)
    ])[None]  # fmt: skip
    diagonal = torch.eye(len(blocks), dtype=torch.bool).expand_as(seen)

    def as_lists(shown: Tensor) -> tuple[Tensor, Tensor]:
        return shown.sum(-1).int(), shown.int().argsort(dim=-1, descending=True, stable=True).int()

    def sees(_batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_block, key_block = query // size, key // size
        is_local = query_block - key_block < PATTERN.num_local_blocks
        is_column = (key_block + head + 1) % PATTERN.vertical_stride == 0
        return (query >= key) & (is_local | is_column)

    return BlockMask.from_kv_blocks(
        *as_lists(seen & diagonal), *as_lists(seen & ~diagonal), BLOCK_SIZE=size, mask_mod=sees
    )


def clock(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
