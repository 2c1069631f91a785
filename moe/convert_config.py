"""What the command convert can be told; the rules of moe/config.py hold here too."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config_checks import check_at_least, check_one_of

WINDOW_NAMES = ("original", "transformers")


@dataclass(frozen=True)
class ConvertConfig:
    """launch/convert.py: published checkpoints to ours, and ours to published ones."""

    source: str = ""  # a Hugging Face folder; or a run, a checkpoint or a converted model of ours
    target: str = ""  # a new folder
    # who counts the sliding window; null: as the model was imported, else as the original
    window: str | None = None
    tokenizer: str | None = None  # import only: a tokenizer.model or a tiktoken ranks file to keep
    max_shard_bytes: int = 5_000_000_000  # export only: tensors of one file, unless one is larger

    def __post_init__(self) -> None:
        if self.window is not None:
            check_one_of("window", self.window, WINDOW_NAMES)
        check_at_least("max_shard_bytes", self.max_shard_bytes, 1)
