"""Start a run from the weights of another: a run, a checkpoint or a converted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from moe.config import TrainConfig
from moe.data.load_tokenizer import load_tokenizer, reads_ids_of
from moe.data.manifest import TOKENIZER_NAME
from moe.errors import CheckpointError
from moe.load_run import OpenedRun, open_run, open_tokenizer
from moe.parallel.engine import Engine
from moe.progress_call import ProgressCall, no_progress
from moe.train.state import parameter_shapes
from moe.train.upcycle import reader_of_copies, require_dense_parent, what_was_copied

_KEY = "train.init_from"


def load_initial_weights(
    engine: Engine,
    config: TrainConfig,
    *,
    tokenizer_sha256: str,
    say: Callable[[str], None],
    progress: ProgressCall = no_progress,
) -> None:
    """Give the engine the parameters of config.train.init_from, converted to the model's type.

    With config.train.upcycle they are a dense model's, and every expert starts as its layer's
    block. Raises ConfigError or CheckpointError where there is no such model, it is damaged, or a
    shape differs. What differs without changing a shape (positions, windows, the tokenizer) is
    said.
    """
    assert config.train.init_from is not None
    opened = open_run(
        config.train.init_from,
        key=_KEY,
        on_skip=lambda why: say(f"skipped: {why}"),
        progress=progress,
    )
    checkpoint = opened.checkpoint
    differences = _model_differences(opened, config)
    read, notes = checkpoint.read_range, [f"note: {one}" for one in differences.values()]
    if config.train.upcycle:
        require_dense_parent(opened, config, differences=differences)
        read, notes = reader_of_copies(read, parameter_shapes(config)), [what_was_copied(config)]
    else:
        _require_same_parameters(opened, config, list(differences.values()))
    engine.load(read, with_moments=False)
    checkpoint.require_unchanged("model")
    say(f"weights: from {checkpoint.folder}, step {checkpoint.step}")
    for note in notes:
        say(note)
    recorded = {file.name: file.sha256 for file in checkpoint.manifest.files}
    if TOKENIZER_NAME not in recorded:
        say(
            "note: these weights came without a tokenizer, so nobody knows whether the data's ids "
            "mean to them what they meant before."
        )
    elif recorded[TOKENIZER_NAME] != tokenizer_sha256 and not _reads_the_data(opened, config):
        say(
            "note: the data were prepared with another tokenizer than these weights were trained "
            "with, so ids mean other text; tokenizer.model_path="
            f"{checkpoint.folder / TOKENIZER_NAME} prepares them with theirs."
        )


def _reads_the_data(opened: OpenedRun, config: TrainConfig) -> bool:
    """Whether the data's ids mean the same text to the weights, though the files differ."""
    path, own = Path(config.paths.data_dir) / TOKENIZER_NAME, open_tokenizer(opened)
    return own is not None and path.is_file() and reads_ids_of(own, load_tokenizer(path))


def _require_same_parameters(
    opened: OpenedRun, config: TrainConfig, differences: list[str]
) -> None:
    """Raise CheckpointError where a parameter is missing, unknown, or of another shape."""
    table, shapes = opened.checkpoint.table("model"), parameter_shapes(config)
    differing = [n for n in shapes if n in table and table[n].shape != shapes[n]]
    if shapes.keys() == table.keys() and not differing:
        return
    odd = sorted(shapes.keys() ^ table.keys()) + differing
    is_upcycling = config.model.is_sparse and not opened.config.model.is_sparse
    raise CheckpointError(
        f"{_KEY}: {opened.checkpoint.folder} holds another model: {'; '.join(differences[:6])} "
        f"({len(odd)} parameters differ, e.g. {odd[0]}). Use the model of its config.json, "
        + ("train.upcycle=true to copy its dense blocks into experts, " if is_upcycling else "")
        + "or leave train.init_from out."
    )


def _model_differences(opened: OpenedRun, config: TrainConfig) -> dict[str, str]:
    """A sentence for each key of the model whose value differs, its name aside."""
    old, new = (dataclasses.asdict(c.model) for c in (opened.config, config))
    return {
        key: f"model.{key}: it has {old[key]!r}, this run asks for {new[key]!r}"
        for key in new
        if key != "name" and old[key] != new[key]
    }
