"""Sharded checkpoints made by one process: the files that ranks with given pieces would write."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moe.parallel.pieces import Piece
from moe.train.checkpoint_files import (
    checkpoint_name,
    make_temporary_folder,
    publish,
    write_files,
    write_manifest,
)
from moe.train.checkpoint_plan import list_pieces, plan_save, tensors_to_write
from moe.train.tensor_file import tensor_file_chunks

Pieces = Mapping[str, Sequence[Piece]]  # of one rank, by stem


def save_as_ranks(
    root: Path,
    step: int,
    ranks: Sequence[Pieces],
    *,
    state: Mapping[str, Any],
    extra_files: Mapping[str, bytes],
) -> Path:
    """Save one checkpoint of what several ranks hold; returns its folder."""
    plan = plan_save([list_pieces(pieces) for pieces in ranks])
    folder = make_temporary_folder(root, step)
    small = {name: [content] for name, content in extra_files.items()}
    records = write_files(folder, small | {"state.json": [json.dumps(dict(state)).encode()]})
    for stem, names in plan.files.items():
        for rank, name in names.items():
            tensors = tensors_to_write(ranks[rank].get(stem, ()))
            records += write_files(folder, {name: tensor_file_chunks(tensors)})
    write_manifest(folder, step, files=records, tables=plan.tables)
    publish(folder, root / checkpoint_name(step))
    return root / checkpoint_name(step)


def random_tiling(
    tensors: Mapping[str, torch.Tensor], num_ranks: int, generator: random.Random, *, num_cuts: int
) -> list[list[Piece]]:
    """Cut each tensor at up to num_cuts random places, and give each piece to a random rank."""
    ranks: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        cuts = {generator.randint(0, count) for _ in range(generator.randint(0, num_cuts))}
        edges = sorted({0, count} | cuts) if count else [0, 0]
        for start, end in itertools.pairwise(edges):
            part = tensor.reshape(-1)[start:end]
            values = tensor if (start, end) == (0, count) and generator.random() < 0.5 else part
            generator.choice(ranks).append(Piece(name, tuple(tensor.shape), start, values))
    for held in ranks:
        generator.shuffle(held)
    return ranks
