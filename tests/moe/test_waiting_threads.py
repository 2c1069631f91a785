"""Waiting threads sleep in every command that may compute, unless the user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe.waiting_threads import CHOICES, let_waiting_threads_sleep

ROOT = Path(__file__).resolve().parents[2]

# stands in for torch: says with which policy it would have been loaded
TORCH = "import os; print('policy', os.environ.get('OMP_WAIT_POLICY'), flush=True); os._exit(0)"


@pytest.mark.parametrize(
    "chosen", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "9"}, {"KMP_BLOCKTIME": "1"}]
)
def test_what_the_user_chose_stays(chosen: dict[str, str]) -> None:
    environment = dict(chosen)
    let_waiting_threads_sleep(environment)
    assert environment == chosen


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "active"}])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["experiment=nano", "data.name=tiny", "tokenizer.vocab_size=512"]),
        ("generate", ["run=runs/a", "prompt=a"]),
        ("evaluate", ["run=runs/a"]),
    ],
)
def test_the_policy_is_set_before_torch_is_imported(
    name: str, arguments: list[str], chosen: dict[str, str], environment, workplace, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    path = os.pathsep.join((str(tmp_path), environment["PYTHONPATH"]))
    unset = {k: v for k, v in environment.items() if k not in CHOICES}
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments],
        cwd=workplace.folder, env={**unset, **chosen, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    policy = chosen.get("OMP_WAIT_POLICY", "passive")
    assert f"policy {policy}" in done.stdout, done.stderr
