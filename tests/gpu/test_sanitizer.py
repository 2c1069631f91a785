"""compute-sanitizer finds no access out of bounds and no race in any kernel of the layer."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized_run
from layer_on_device import NEEDS_DEVICE, NEEDS_GPU

SCRIPT = Path(__file__).with_name("sanitized_run.py")
SECONDS = 90


def find_sanitizer() -> str | None:
    """On the path, or where CUDA's installers put it."""
    folders = (os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda", "/opt/cuda")
    on_path = shutil.which("compute-sanitizer")
    candidates = [Path(folder, "bin", "compute-sanitizer") for folder in folders]
    return on_path or next((str(path) for path in candidates if path.exists()), None)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
class TestSanitizer:
    pytestmark = NEEDS_GPU

    def test_it_finds_nothing(self, tool):
        program = find_sanitizer()
        if program is None:
            pytest.skip("compute-sanitizer is not installed here")
        options = ["--tool", tool, "--error-exitcode", "9"]
        if tool == "memcheck":  # a call that failed and was handled, of another library, is none
            options += ["--report-api-errors", "no"]
        command = [program, *options, sys.executable, str(SCRIPT)]
        # without torch's cache every tensor is an allocation of its own, with bounds to overstep
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the watched program too
            process.communicate()
            pytest.skip(f"compute-sanitizer --tool {tool} took more than {SECONDS} s")
        if process.returncode != 9 and not all(name in output for name in sanitized_run.NAMES):
            last = (output.strip().splitlines() or ["nothing printed"])[-1]
            pytest.skip(f"compute-sanitizer --tool {tool} did not run the layer here: {last}")
        assert process.returncode == 0, output[-6000:]


@pytest.mark.parametrize("unused", ["script"])
class TestScript:
    pytestmark = NEEDS_DEVICE

    def test_what_it_watches_runs_without_it(self, unused, capsys):
        sanitized_run.main()
        assert len(capsys.readouterr().out.splitlines()) == len(sanitized_run.NAMES)
