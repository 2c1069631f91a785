"""Open a trained run or a converted model: its model, tokenizer and configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe.config import TrainConfig
from moe.config_from_dict import from_dict
from moe.data.load_tokenizer import TextTokenizer, load_tokenizer, reads_ids_of
from moe.data.manifest import TOKENIZER_NAME
from moe.data.shards import TokenSplit
from moe.errors import CheckpointError, ConfigError, DataError
from moe.model.transformer import Transformer, build_model
from moe.progress_call import ProgressCall, no_progress
from moe.run_folder import find_run
from moe.train.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from moe.train.state import load_model, require_parameters

_STEMS = ("model",)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class OpenedRun:
    """One verified checkpoint and its configuration, with secrets hidden, as it was written."""

    checkpoint: Checkpoint
    config: TrainConfig

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that holds every stored parameter: float32 for a run of ours."""
        stored = {record.dtype for record in self.checkpoint.table("model").values()}
        return _DTYPES.get(next(iter(stored)), torch.float32) if len(stored) == 1 else torch.float32


@dataclass(frozen=True)
class LoadedRun:
    """A model in evaluation mode, in its stored type, on its device, and what belongs to it."""

    model: Transformer
    tokenizer: TextTokenizer | None  # None: a converted model that came without one
    config: TrainConfig
    checkpoint: Checkpoint

    @property
    def precision(self) -> torch.dtype:
        """The one that the run was trained and evaluated in, or the published model's type."""
        return getattr(torch, self.checkpoint.state["train"]["precision"])

    def window(self, seq_len: int) -> int:
        """The window asked for, or the run's own for 0; ConfigError where it is too long."""
        usable = self.config.model.usable_length
        if seq_len > usable:
            raise ConfigError(
                f"seq_len: got {seq_len}; the model takes at most {usable}. "
                f"Set seq_len={usable} or less, or 0 for the run's own {self.config.data.seq_len}."
            )
        return seq_len or self.config.data.seq_len

    def require_tokenizer_of(self, split: TokenSplit, *, key: str) -> None:
        """DataError where ids of these data mean other text than the model's; key names them."""
        own = self.require_tokenizer()
        data, model = split.manifest.tokenizer.sha256, own.sha256
        if data == model:
            return
        of_data = load_tokenizer(
            split.data_dir / TOKENIZER_NAME, vocab_size=split.manifest.vocab_size
        )
        if not reads_ids_of(own, of_data):
            raise DataError(
                f"{key}: {split.data_dir} was made by another tokenizer (SHA-256 {data[:12]}...) "
                f"than the model's ({model[:12]}...), so its ids mean other text. Prepare the text "
                "again, in another folder, with the model's: tokenizer.model_path="
                f"{self.checkpoint.folder / TOKENIZER_NAME} "
                f"tokenizer.vocab_size={self.config.model.vocab_size}."
            )

    def require_tokenizer(self) -> TextTokenizer:
        """The tokenizer; DataError with what to do where there is none."""
        if self.tokenizer is None:
            raise DataError(
                f"run: {self.checkpoint.folder} came without a tokenizer, so it takes no text. "
                "Convert the model again with tokenizer=FILE, its SentencePiece tokenizer.model, "
                "tokenizer.json or tiktoken ranks file."
            )
        return self.tokenizer


def load_run(run: str, *, device: torch.device, on_skip: Callable[[str], None]) -> LoadedRun:
    """Load a run folder's newest good checkpoint, one checkpoint's folder, or a converted model.

    Every byte is verified, then copied into the model in pieces: memory is one model and a little.
    on_skip is told of each damaged checkpoint passed over. Raises CheckpointError where none is
    good, ConfigError or CheckpointError where `run` is no run, DataError for its tokenizer.
    """
    opened = open_run(run, on_skip=on_skip)
    tokenizer = open_tokenizer(opened)
    config = opened.config
    model = build_model(
        config.model, config.router, config.experts, device="meta", dtype=opened.dtype
    )
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    require_parameters(opened.checkpoint, shapes)  # before memory is taken
    model = model.to_empty(device=device)
    if config.model.tie_embeddings:  # to_empty gives tied weights separate memory
        model.head.weight = model.embed.weight
    load_model(model, opened.checkpoint)
    return LoadedRun(model.eval(), tokenizer, config, opened.checkpoint)


def open_run(
    run: str,
    *,
    on_skip: Callable[[str], None],
    key: str = "run",
    progress: ProgressCall = no_progress,
) -> OpenedRun:
    """Verify a run's newest good checkpoint, or the one given, and read its configuration.

    Of its tensors only the model's: moments are twice as many bytes, and nobody reads them. key is
    what the user calls the folder, for messages; progress is told of the bytes hashed and read.
    """
    place = find_run(run, key=key)
    if place.is_one_checkpoint:
        checkpoint = open_checkpoint(place.folder, stems=_STEMS, progress=progress)
    else:
        found = find_checkpoint(place.folder, on_skip=on_skip, stems=_STEMS, progress=progress)
        if found is None:
            raise CheckpointError(f"{key}: {run!r} holds no checkpoint any more.")
        checkpoint = found
    config = _read_config(checkpoint)
    _require_size(checkpoint, config)
    return OpenedRun(checkpoint, config)


def open_tokenizer(opened: OpenedRun) -> TextTokenizer | None:
    """The tokenizer that was verified with the checkpoint, or None where there is none."""
    checkpoint = opened.checkpoint
    if TOKENIZER_NAME not in checkpoint.verified:
        return None
    path = checkpoint.file(TOKENIZER_NAME)
    # the rows of the embedding are the most that a tokenizer may use
    tokenizer = load_tokenizer(path, vocab_size=opened.config.model.vocab_size)
    recorded = {file.name: file.sha256 for file in checkpoint.manifest.files}[TOKENIZER_NAME]
    if tokenizer.sha256 != recorded:
        raise CheckpointError(
            f"{path}: it was changed by another program after it was verified. "
            "Restore the file from a copy."
        )
    return tokenizer


def pick_device(name: str) -> torch.device:
    """The torch device of "auto" (CUDA where there is one), "cpu" or "cuda"."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError(
            "device: got 'cuda', and torch finds no CUDA device; allowed here: cpu, auto. "
            "`python launch/doctor.py` says what this machine can do."
        )
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def _require_size(checkpoint: Checkpoint, config: TrainConfig) -> None:
    """CheckpointError where config.json is of a model of another size than the tensors beside it.

    Before any memory is taken: the model of a damaged or hostile file may have any size.
    """
    table, model = checkpoint.table("model"), config.model
    saved = sum(math.prod(record.shape) for record in table.values())
    if model.num_parameters() != saved or model.num_layers > len(table):
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'}: describes a model of "
            f"{model.num_parameters():,} parameters in {model.num_layers:,} layers; the tensors "
            f"beside it are {len(table):,} of {saved:,} in all. Restore the folder from a copy."
        )


def _read_config(checkpoint: Checkpoint) -> TrainConfig:
    path = checkpoint.file("config.json")
    try:
        return from_dict(TrainConfig, json.loads(path.read_bytes()))
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"{path}: this version does not understand it: {error} "
            "Load the checkpoint with the version that wrote it."
        ) from None
