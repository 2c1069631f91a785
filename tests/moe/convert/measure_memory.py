"""Time and peak memory of launch/convert.py in both directions, on a checkpoint of any size.

    python tests/moe/convert/measure_memory.py FOLDER --layers 3

makes a Phi-3.5-MoE of so many layers (2.6 GB each, 0.5 GB besides) in FOLDER, imports it, exports
it, compares every tensor's SHA-256, and removes all of it. It needs three times the space.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(Path(__file__).parent))
from published_folders import CONFIGS, moe_shapes  # noqa: E402 - a script has no package

# VmHWM is the peak of this program alone; what rusage says may be the parent's, from before exec
_RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, __import__("os").path.dirname(sys.argv[0]))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
"""


def moe_config(*, layers: int, width: int, inner: int, experts: int, vocabulary: int) -> dict:
    """config.json of a Phi-3.5-MoE of other sizes."""
    heads = width // 128
    return {
        **CONFIGS["phimoe"], "hidden_size": width, "intermediate_size": inner,
        "num_local_experts": experts, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
        "max_position_embeddings": 4096, "rope_scaling": None, "torch_dtype": "bfloat16",
    }  # fmt: skip


def write_synthetic(folder: Path, config: Mapping[str, Any], *, shard_bytes: int) -> int:
    """Write a bfloat16 checkpoint with little memory; every tensor differs. Returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = moe_shapes(config)
    block = np.random.default_rng(0).standard_normal(2**22).astype(np.float32)
    block = (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    shards: list[dict[str, int]] = [{}]
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        if shards[-1] and sum(shards[-1].values()) + size > shard_bytes:
            shards.append({})
        shards[-1][key] = size
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {}, 0
        for key, size in shard.items():
            header[key] = {
                "dtype": "BF16", "shape": shapes[key], "data_offsets": [end, end + size],
            }  # fmt: skip
            end += size
            weight_map[key] = name
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key, size in shard.items():
                first = 2 * (int(hashlib.sha256(key.encode()).hexdigest(), 16) % 2**20)
                while size:
                    piece = block[first : first + size]
                    file.write(piece)
                    size, first = size - len(piece), 0
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(map(sum, (shard.values() for shard in shards)))


def convert(source: Path, target: Path, *arguments: str) -> tuple[float, int]:
    """Run launch/convert.py in a process of its own; (seconds, peak resident bytes)."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(ROOT / "launch/convert.py"), f"source={source}",
         f"target={target}", *arguments],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    match = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    assert match
    return seconds, int(match[1]) * 1024


def tensor_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, read a piece at a time."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start - 8))
            for key, entry in header.items():
                if key == "__metadata__":
                    continue
                first, end = entry["data_offsets"]
                digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
                file.seek(start + first)
                for place in range(first, end, 2**24):
                    digest.update(file.read(min(2**24, end - place)))
                found[key] = digest.hexdigest()
    return found


def main() -> None:
    """Measure, print, remove."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=3)
    arguments = parser.parse_args()
    config = moe_config(
        layers=arguments.layers, width=4096, inner=6400, experts=16, vocabulary=32_064
    )
    root: Path = arguments.folder
    root.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root)
        size = write_synthetic(root / "hf", config, shard_bytes=5_000_000_000)
        print(f"checkpoint: {size / 1e9:.2f} GB, {arguments.layers} layers", flush=True)
        for what, source, target in (("import", "hf", "ours"), ("export", "ours", "back")):
            seconds, peak = convert(root / source, root / target)
            print(
                f"{what}: {seconds:.0f} s, {size / 1e9 / seconds:.2f} GB/s, "
                f"peak {peak / 2**20:.0f} MiB",
                flush=True,
            )
        same = tensor_hashes(root / "hf") == tensor_hashes(root / "back")
        print(f"every tensor identical: {same}")


if __name__ == "__main__":
    main()
