"""Where and with what a measurement was made: the columns that every row of a result carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_UNKNOWN = "unknown"
_QUERY = "driver_version,clocks.max.sm,power.limit"


def provenance(device: str) -> dict[str, str]:
    """Text by column name; "unknown" where this machine does not say."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "device": platform.processor() or platform.machine(),
        "driver": _UNKNOWN,
        "max_sm_mhz": _UNKNOWN,
        "power_limit_w": _UNKNOWN,
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        answers = _nvidia_smi(_QUERY)
        if len(answers) == 3:
            found |= dict(zip(("driver", "max_sm_mhz", "power_limit_w"), answers, strict=True))
    return found


def version(package: str) -> str:
    """Of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """PHIMOE_COMMIT, or what git says, with "+" for a changed tree; else "unknown".

    A copy of the tree without .git, as a GPU machine may have it, is told by the variable.
    """
    told = os.environ.get("PHIMOE_COMMIT")
    if told:
        return told
    found = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not found:
        return _UNKNOWN
    return found + ("+" if _output(["git", "-C", str(ROOT), "status", "--porcelain"]) else "")


def sm_mhz(device: str) -> str:
    """The multiprocessors' clock now: called right after work, before it falls."""
    answers = _nvidia_smi("clocks.sm") if device == "cuda" else []
    return answers[0] if answers else _UNKNOWN


def _nvidia_smi(query: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    text = _output(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    )
    return [part.strip() for part in text.splitlines()[0].split(",")] if text else []


def _output(command: list[str]) -> str:
    """What it prints, or nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
