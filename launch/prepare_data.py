"""Turn text into token shards that training reads; the tokenizer is trained from the same text.

usage: python launch/prepare_data.py [group=option ...] [key=value ...]

examples:
  python launch/prepare_data.py
  python launch/prepare_data.py data=files data.name=mine 'data.sources=[texts,notes.jsonl.zst]'
  python launch/prepare_data.py data.max_bytes=2000000 tokenizer.vocab_size=1024 data.name=small
The same command goes on where it was stopped, by a kill too.
Train on it with the same data.name and tokenizer: python launch/train.py data.name=mine
"""

from __future__ import annotations

import time

from command import run_command
from tables import corpus_table

from moe.config import PrepareConfig


def prepare_data(config: PrepareConfig) -> None:
    """Prepare, show progress, and print what was made."""
    from moe.data.prepare import prepare
    from moe.train.progress import progress_bar

    rates = StageRates()
    with progress_bar("prepare") as show:

        def on_progress(stage: str, done: int, total: int) -> None:
            rates.add(stage, done)
            show(stage, done, total)

        manifest = prepare(config, on_progress=on_progress)
    for line in [*corpus_table(manifest), *rates.line()]:
        print(line)
    print(f"data: {config.paths.data_dir}")


class StageRates:
    """How fast each stage went, from the calls of its progress."""

    def __init__(self) -> None:
        self._spans: dict[str, tuple[float, float, int]] = {}  # (began, last, bytes done)
        self._from: dict[str, int] = {}  # what was done when it began, by a command before

    def add(self, stage: str, done: int) -> None:
        """A call of the progress."""
        now = time.monotonic()
        self._from.setdefault(stage, done)
        began, _, _ = self._spans.setdefault(stage, (now, now, done))
        self._spans[stage] = (began, now, done)

    def line(self) -> list[str]:
        """The rates as a line; nothing where nothing was done."""
        words = [
            f"{stage} {(done - self._from[stage]) / (last - began) / 1e6:,.1f} MB/s"
            for stage, (began, last, done) in self._spans.items()
            if last - began > 0.1 and done > self._from[stage]
        ]
        return [f"rates: {', '.join(words)}"] if words else []


if __name__ == "__main__":
    run_command(
        "prepare_data",
        PrepareConfig,
        prepare_data,
        about=__doc__,
        writes="paths.data_dir",
        on_interrupt="interrupted; the same command goes on with what is done.",
    )
