"""What waiting threads cost: seconds a step, asleep or spinning, alone and beside busy processes.

usage: python launch/measure_neighbour.py [key=value ...]   # as of launch/train.py; needs its data

Each setting is a training run of its own, taken in turn over the rounds; the first steps of each
are left out. On a quiet machine the difference without a neighbour is what sleeping costs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from moe.waiting_threads import CHOICES

_SETTINGS = {
    "spinning": {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": "300000"},  # GNU's default
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "100 spins": {"GOMP_SPINCOUNT": "100"},
    "asleep": {"OMP_WAIT_POLICY": "passive"},
}
_NEIGHBOURS, _ROUNDS, _STEPS, _WARM_UP = (0, 1), 2, 14, 4
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def main() -> None:
    """Run every setting with every number of neighbours, and print a table."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(_ROUNDS):
        for busy in _NEIGHBOURS:
            for name, variables in _SETTINGS.items():
                took = _step_seconds(variables, busy, sys.argv[1:])
                seconds.setdefault((name, busy), []).extend(took)
    print(f"{'median seconds a step':24}" + "".join(f"{n:>8} busy" for n in _NEIGHBOURS))
    for name in _SETTINGS:
        medians = [statistics.median(seconds[name, busy]) for busy in _NEIGHBOURS]
        print(f"{name:24}" + "".join(f"{median:13.3f}" for median in medians))


def _step_seconds(variables: dict[str, str], busy: int, overrides: list[str]) -> list[float]:
    inherited = {name: value for name, value in os.environ.items() if name not in CHOICES}
    # sessions of their own, as another user's job would be: the scheduler weighs sessions
    neighbours = [
        subprocess.Popen([sys.executable, "-c", _BUSY], start_new_session=True)
        for _ in range(busy)
    ]  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [
                    sys.executable, str(Path(__file__).parent / "train.py"), "logging=disabled",
                    f"train.steps={_STEPS}", "optim.warmup_steps=2", "train.evaluate_every=0",
                    "train.evaluate_tokens=1000", "train.save_every=0", "train.sample_tokens=0",
                    f"paths.run_dir={folder}/run", *overrides,
                ],
                env=inherited | variables, stdout=subprocess.DEVNULL, check=True,
            )  # fmt: skip
            lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    steps = [record for line in lines if (record := json.loads(line))["kind"] == "train"]
    return [record["step_seconds"] for record in steps[_WARM_UP:]]


if __name__ == "__main__":
    main()
