"""Plain modules of this folder are importable by its tests; and runs for those that read some."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# importlib mode puts no folder of tests on the path
sys.path.insert(0, str(Path(__file__).parent))


@dataclass(frozen=True)
class Runs:
    """Real nano runs on the same text; look, do not touch.

    sparse: 60 steps, every tenth recorded, traces with logits of its checkpoints at 20 and 60.
    dense: 10 steps. bare: sparse, 4 steps, neither recorded nor traced.
    """

    sparse: Path
    dense: Path
    bare: Path


@pytest.fixture(scope="session")
def runs(workplace: Any, command: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Train them with the real commands, beside a copy of the workplace: about 20 seconds."""
    folder: Path = workplace.copy(tmp_path_factory.mktemp("recorded")).folder

    def run(name: str, *arguments: str) -> None:
        done = command(name, *arguments, cwd=folder)
        assert done.returncode == 0, done.stderr

    train = [text for text in workplace.train if not text.startswith("train.")]
    train += ["train.precision=float32", "train.evaluate_tokens=2000"]
    run(
        "train", *train, "train.steps=60", "train.trace_every=10", "train.save_every=20",
        "train.evaluate_every=20", "train.keep_last=5", "paths.run_dir=runs/sparse",
    )  # fmt: skip
    run(
        "train", *train, "train.steps=10", "train.save_every=10", "train.evaluate_every=5",
        "model.name=nano_dense", "model.num_experts=0", "model.top_k=0",
        "model.intermediate_size=96", "paths.run_dir=runs/dense",
    )  # fmt: skip
    for step in (20, 60):
        place = f"step_{step:08d}"
        run(
            "trace", f"run=runs/sparse/checkpoints/{place}", f"target=runs/sparse/traces/{place}",
            "logits=true", "split=train", "seq_len=512",
        )  # fmt: skip
    return Runs(folder / "runs/sparse", folder / "runs/dense", folder / "runs/a")
