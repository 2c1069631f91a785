"""Write down which experts a trained model chose, for benchmarks with recorded routing.

usage: python kernels/bench/record_routing.py RUN_FOLDER FILE.npy [--tokens 65536] [--data FOLDER]

Held-out text runs through the model as in evaluation, so its choices are the largest ones, not
sampled. FILE.npy gets uint8 (tokens, K) of the layer whose fullest expert has the largest share,
and FILE.json beside it what it came from.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from moe.data.loader import evaluation_batches  # noqa: E402 the path comes first
from moe.data.shards import open_split  # noqa: E402
from moe.load_run import load_run  # noqa: E402


@torch.no_grad()
def record(run_folder: Path, data: Path | None, *, num_tokens: int) -> tuple[np.ndarray, dict]:
    """Return expert_TK (uint8) and a description of the run and the text."""
    run = load_run(str(run_folder), device=torch.device("cpu"), on_skip=print)
    split = open_split(data or run.config.paths.data_dir, "validation", verify=True)
    seq_len = run.config.data.seq_len
    found: list[np.ndarray] = []
    batches = evaluation_batches(
        split, seq_len=seq_len, batch_size=16, max_tokens=num_tokens + 16 * seq_len
    )
    for batch in batches:
        with torch.autocast("cpu", dtype=run.precision, enabled=run.precision != torch.float32):
            output = run.model(batch.tokens, position_BS=batch.position, document_BS=batch.document)
        experts = torch.stack([routing.expert_TK for routing in output.routings])
        # padding is no text: only windows of real documents count
        is_real_T = batch.document.flatten() >= 0
        found.append(experts[:, is_real_T].numpy().astype(np.uint8))
    expert_LTK = np.concatenate(found, axis=1)[:, :num_tokens]
    shares = [float(np.bincount(layer.ravel()).max() / layer.size) for layer in expert_LTK]
    layer = int(np.argmax(shares))
    about = {
        "model": run.config.model.name,
        "step": run.checkpoint.step,
        "num_experts": run.config.model.num_experts,
        "tokens": expert_LTK.shape[1],
        "text": "validation split, windows of " + str(seq_len),
        "layer": layer,
        "fullest_expert_share_by_layer": [round(share, 4) for share in shares],
    }
    return expert_LTK[layer], about


def main() -> None:
    """Read the command line, write both files, print the description."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    expert_TK, about = record(options.run, options.data, num_tokens=options.tokens)
    np.save(options.file, expert_TK, allow_pickle=False)
    options.file.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
