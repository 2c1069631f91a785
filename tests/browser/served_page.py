"""The command of the page as a process, a page that is watched, and the contrast of its texts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

ROOT = Path(__file__).parents[2]


@contextmanager
def served(
    place: Path, environment: dict[str, str], *words: str, end: signal.Signals = signal.SIGINT
) -> Iterator[str]:
    """Run the command until the page answers; yields its address, then ends it: as Ctrl-C does."""
    command = [sys.executable, str(ROOT / "launch" / "explore.py"), *words, "browser=false"]
    with subprocess.Popen(command, cwd=place, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as page:  # fmt: skip
        assert page.stdout is not None
        try:
            said = []
            for line in page.stdout:
                said.append(line)
                if line.startswith("page: "):
                    yield line.split()[1]
                    break
            else:
                pytest.fail("".join(said) + page.communicate()[1])
        finally:
            page.send_signal(end)
            try:
                page.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                page.kill()  # leaving Popen's block waits without a limit
                raise
    assert page.returncode == 130


@dataclass
class Watched:
    """A page, and what its browser said and asked for."""

    page: Page
    said: list[str]
    asked: list[str]


Opener = Callable[..., Watched]


def contrast(page: Page, selector: str) -> float:
    """Of a text's colour against the page's (WCAG 2.2): the canvas reads colours of any syntax."""
    pair = page.locator(selector).first.evaluate(
        """e => {
          const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
            .getContext('2d', {willReadFrequently: true});
          const read = colour => { context.clearRect(0, 0, 1, 1); context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1); return [...context.getImageData(0, 0, 1, 1).data]; };
          let behind = e;
          while (behind && read(getComputedStyle(behind).backgroundColor)[3] < 255)
            behind = behind.parentElement;
          return [read(getComputedStyle(e).color),
                  behind ? read(getComputedStyle(behind).backgroundColor) : [255, 255, 255, 255]];
        }"""
    )
    light = sorted(_luminance(colour) for colour in pair)
    return (light[1] + 0.05) / (light[0] + 0.05)


def _luminance(colour: list[int]) -> float:
    part = np.array(colour[:3]) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
