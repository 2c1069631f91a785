"""What the command trace can be told; the rules of moe/config.py hold here too."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config_checks import check_at_least, check_one_of
from moe.errors import ConfigError
from moe.inference_config import DEVICE_NAMES, SPLIT_NAMES


@dataclass(frozen=True)
class TraceConfig:
    """launch/trace.py: which experts every token of a text takes."""

    run: str = ""  # a run folder (its newest good checkpoint), one checkpoint, or a converted model
    target: str = ""  # a new folder, or that of an interrupted trace, which goes on
    data_dir: str | None = None  # prepared data; null: those that the run was trained on
    split: str = "validation"
    domains: tuple[str, ...] = ()  # of the prepared data; empty: all
    max_tokens: int = 0  # whole documents up to about this many tokens, evenly by domain; 0: all
    seq_len: int = 0  # documents are cut to this length; 0: the run's own
    batch_size: int = 8  # documents in a forward pass
    logits: bool = False  # record every expert's logit too: larger files
    part_tokens: int = 262_144  # of one file; an interruption costs no more than one
    device: str = "auto"

    def __post_init__(self) -> None:
        check_one_of("split", self.split, SPLIT_NAMES)
        check_one_of("device", self.device, DEVICE_NAMES)
        check_at_least("max_tokens", self.max_tokens, 0)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("part_tokens", self.part_tokens, 1)
        if self.seq_len != 0:
            check_at_least("seq_len", self.seq_len, 2)
        if len(set(self.domains)) != len(self.domains):
            raise ConfigError(
                f"domains: got {list(self.domains)}; each name may be given once. Remove one."
            )
