"""How much memory this process has, and had at its fullest, as Linux counts it.

Not getrusage: its peak is the parent's, where that had more before it started this one.
"""

from __future__ import annotations

from pathlib import Path


def reset_peak_rss() -> None:
    """Let the kernel's peak of resident memory start again from now."""
    Path("/proc/self/clear_refs").write_text("5")


def rss_bytes(field: str) -> int:
    """VmRSS: resident memory now; VmHWM: its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")
