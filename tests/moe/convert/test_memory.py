"""The memory of a conversion does not grow with the checkpoint; the real commands are measured."""

from __future__ import annotations

import pytest
from measure_memory import convert, moe_config, tensor_hashes, write_synthetic

MIB = 2**20


@pytest.mark.slow
def test_a_conversion_of_240_mb_takes_no_more_memory_than_one_of_40(fast_folder):
    peaks: dict[str, list[int]] = {"import": [], "export": []}
    for layers in (1, 6):
        root = fast_folder / str(layers)
        config = moe_config(layers=layers, width=512, inner=1600, experts=8, vocabulary=512)
        size = write_synthetic(root / "hf", config, shard_bytes=100 * MIB)
        assert size / layers > 38 * MIB
        for what, source, target in (("import", "hf", "ours"), ("export", "ours", "back")):
            _, peak = convert(root / source, root / target, "max_shard_bytes=100_000_000")
            peaks[what].append(peak)
        assert tensor_hashes(root / "hf") == tensor_hashes(root / "back")
    for what, (small, large) in peaks.items():
        assert large - small < 40 * MIB, (what, peaks)  # of 190 MiB more tensors
        assert small < 700 * MIB, (what, peaks)
