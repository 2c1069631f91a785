"""Open a trained run to use it: its model, tokenizer and configuration from one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe.config import TrainConfig
from moe.config_from_dict import from_dict
from moe.data.manifest import TOKENIZER_NAME
from moe.data.tokenizer import Tokenizer
from moe.errors import CheckpointError, ConfigError
from moe.model.transformer import Transformer, build_model
from moe.run_folder import find_run
from moe.train.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from moe.train.state import load_model


@dataclass(frozen=True)
class LoadedRun:
    """A model in evaluation mode, float32, on its device, and what belongs to it."""

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig  # with secrets hidden, as it was written
    checkpoint: Checkpoint

    @property
    def precision(self) -> torch.dtype:
        """The one that the run was trained and evaluated in."""
        return getattr(torch, self.checkpoint.state["train"]["precision"])


def load_run(run: str, *, device: torch.device, on_skip: Callable[[str], None]) -> LoadedRun:
    """Load a run folder's newest good checkpoint, or one checkpoint's folder, every byte verified.

    on_skip is told of each damaged checkpoint passed over. Raises CheckpointError where none is
    good, ConfigError or CheckpointError where `run` is no run, DataError for its tokenizer.
    """
    place = find_run(run)
    if place.is_one_checkpoint:
        checkpoint = open_checkpoint(place.folder)
    else:
        found = find_checkpoint(place.folder, on_skip=on_skip)
        if found is None:
            raise CheckpointError(f"run: {run!r} holds no checkpoint any more.")
        checkpoint = found
    config = _read_config(checkpoint)
    tokenizer_path = checkpoint.file(TOKENIZER_NAME)
    # the rows of the embedding are the most that a tokenizer may use
    tokenizer = Tokenizer.load(tokenizer_path, vocab_size=config.model.vocab_size)
    recorded = {file.name: file.sha256 for file in checkpoint.manifest.files}[TOKENIZER_NAME]
    if tokenizer.sha256 != recorded:
        raise CheckpointError(
            f"{tokenizer_path}: it was changed by another program after it was verified. "
            "Restore the file from a copy."
        )
    model = build_model(config.model, config.router, config.experts, device=device)
    load_model(model, checkpoint)
    return LoadedRun(model.eval(), tokenizer, config, checkpoint)


def pick_device(name: str) -> torch.device:
    """The torch device of "auto" (CUDA where there is one), "cpu" or "cuda"."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ConfigError(
            "device: got 'cuda', and torch finds no CUDA device; allowed here: cpu, auto. "
            "`python launch/doctor.py` says what this machine can do."
        )
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def _read_config(checkpoint: Checkpoint) -> TrainConfig:
    path = checkpoint.file("config.json")
    try:
        return from_dict(TrainConfig, json.loads(path.read_bytes()))
    except (ConfigError, ValueError) as error:
        raise CheckpointError(
            f"{path}: this version does not understand it: {error} "
            "Load the checkpoint with the version that wrote it."
        ) from None
