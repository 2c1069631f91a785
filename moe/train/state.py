"""What a run needs to go on exactly: its state, how it becomes a checkpoint, and the way back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from moe.config import TrainConfig
from moe.errors import CheckpointError
from moe.model.transformer import build_model
from moe.parallel.engine import Engine
from moe.parallel.pieces import model_pieces, optimizer_pieces, without_empty
from moe.train.checkpoint import Checkpoint
from moe.train.checkpoint_writer import CheckpointWriter, Saved
from moe.train.random_state import capture_random_state, restore_random_state

# which text and which tokenizer is not compared by its settings but by the data's fingerprint
_FIXED = ("seed", "model", "router")
_FIXED_IN = {"data": ("seq_len",), "train": ("batch_size", "overfit")}


@dataclass
class TrainState:
    """The numbers that change; the data cursor is `step` alone (moe/data/loader.py)."""

    run_id: str
    precision: str  # decided once: a resumed run must not measure its way to another one
    step: int = 0  # optimiser steps done, skipped ones included
    tokens_seen: int = 0  # labels trained on
    consecutive_skips: int = 0
    skipped_steps: list[int] = field(default_factory=list)
    best_step: int | None = None  # of the checkpoint that train.keep_best keeps
    best_loss: float | None = None  # nats a token of the validation text, at that step

    def note_validation(self, loss: float) -> None:
        """Take this step's checkpoint for the best so far, if its validation loss is the lowest."""
        if math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss = self.step, loss


def save_state(
    writer: CheckpointWriter,
    engine: Engine,
    state: TrainState,
    *,
    config: dict[str, Any],
    data_fingerprint: str,
    tokenizer_path: Path,
) -> Saved | None:
    """Save one checkpoint of everything, all ranks at once; see CheckpointWriter.save."""
    held = engine.held()
    return writer.save(
        state.step,
        best_step=state.best_step,
        pieces={
            "model": list(without_empty(model_pieces(held))),
            "optimizer": list(without_empty(optimizer_pieces(held))),
        },
        state={
            "train": dataclasses.asdict(state),
            "random": capture_random_state(),
            "data_fingerprint": data_fingerprint,
        },
        extra_files={
            "config.json": json.dumps(config, indent=1).encode(),
            "tokenizer.model": tokenizer_path,
        },
    )


def restore_state(
    checkpoint: Checkpoint, engine: Engine, *, config: TrainConfig, data_fingerprint: str
) -> TrainState:
    """Load a verified checkpoint into the engine and the random generators; return its state.

    The layout that saved it does not matter: each rank reads the ranges that it holds. Raises
    CheckpointError, before any weight is touched, where model, router, data, seed, batch or
    precision differ: the run would go on as neither of the two.
    """
    refuse_other_run(checkpoint, config=config, data_fingerprint=data_fingerprint)
    require_parameters(checkpoint, parameter_shapes(config))
    # where every step so far was skipped there are no moments yet
    engine.load(checkpoint.read_range, with_moments=bool(checkpoint.table("optimizer")))
    for stem in ("model", "optimizer"):
        checkpoint.require_unchanged(stem)
    restore_random_state(checkpoint.state["random"])
    return TrainState(**checkpoint.state["train"])


def parameter_shapes(config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the whole model by name, tied ones once."""
    model = build_model(config.model, config.router, device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def require_parameters(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError where the checkpoint's parameters are not those of these shapes."""
    saved = checkpoint.table("model")
    differing = [n for n in shapes if n in saved and saved[n].shape != shapes[n]]
    if saved.keys() != shapes.keys() or differing:
        odd = sorted(saved.keys() ^ shapes.keys())[:4] + differing[:4]
        raise CheckpointError(
            f"{checkpoint.folder}: its parameters are not this model's ({', '.join(odd)}). "
            "Load it with the model configuration in its config.json."
        )


def load_model(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's parameters into a whole model; names and shapes must agree exactly."""
    wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
    require_parameters(checkpoint, {name: tuple(p.shape) for name, p in wanted.items()})
    checkpoint.copy_tensors("model", wanted)


def refuse_other_run(checkpoint: Checkpoint, *, config: TrainConfig, data_fingerprint: str) -> None:
    """Raise CheckpointError naming each key whose value differs from the checkpoint's run."""
    saved = json.loads(checkpoint.file("config.json").read_text())
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    # a key that is younger than the checkpoint had its default's meaning
    first = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))
    pairs = [(_filled(saved.get(group), first[group]), now[group], group) for group in _FIXED]
    pairs += [
        (saved[group].get(key, first[group][key]), now[group][key], f"{group}.{key}")
        for group, keys in _FIXED_IN.items()
        for key in keys
    ]
    was = checkpoint.state["train"]["precision"]  # what auto has become
    if config.parallel.bf16_parameters and was != "bfloat16":
        pairs.append((f"train.precision {was}", True, "parallel.bf16_parameters"))
    elif config.train.precision != "auto":
        pairs.append((was, config.train.precision, "train.precision"))
    differences = [
        f"{path}: the checkpoint has {old!r}, this run asks for {new!r}"
        for pair in pairs
        for path, old, new in _differences(*pair)
    ]
    if not differences and checkpoint.state["data_fingerprint"] != data_fingerprint:
        differences.append(
            f"{config.paths.data_dir}: the prepared data are not those of this run, or it has more "
            "than 1,048,576 documents and an earlier version read them in another order"
        )
    if differences:
        raise CheckpointError(
            f"{checkpoint.folder} belongs to another run. {'; '.join(differences)}. "
            "Use the same values to go on with it, or another paths.run_dir to start anew."
        )


def _filled(values: Any, defaults: Any) -> Any:
    if not (isinstance(values, dict) and isinstance(defaults, dict)):
        return values
    return {key: _filled(values.get(key, d), d) for key, d in defaults.items()} | {
        key: value for key, value in values.items() if key not in defaults
    }


def _differences(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [(path, old, new)]
