"""What a run's training log says of its experts and losses, as arrays for the page.

Kept in a temporary file while the page is open: a log of many steps is read once, by the command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.errors import DataError
from moe.train.atomic_files import replace_file

Floats = NDArray[np.float64]
Series = tuple[Floats, Floats]  # (N,) steps, (N,) values
# the names of single numbers in the log that the page draws
NUMBERS = ("loss", "validation/loss", "loss/balance", "loss/z", "router/dead_experts")


@dataclass(frozen=True, eq=False)
class RunLog:
    """S logged steps with routing, which may be none; series have their own steps."""

    step_S: NDArray[np.int64]
    load_SLE: NDArray[np.float32]  # each expert's share of its layer's choices in that step
    entropy_SL: NDArray[np.float32]  # of the router's probabilities, nats, mean over tokens
    series: dict[str, Series]  # by a name in NUMBERS, where the log has it

    @property
    def has_routing(self) -> bool:
        """Whether any step has expert loads: not of a dense model."""
        return len(self.step_S) > 0


def read_log(records: list[dict[str, Any]]) -> RunLog:
    """Arrays of the records of a metrics.jsonl (moe.train.metrics.read_metrics).

    A step whose load is not finite, or of another shape than the last step's, is left out.
    """
    routed = [record for record in records if _load_of(record).ndim == 2]
    shape = _load_of(routed[-1]).shape if routed else (0, 0)
    routed = [record for record in routed if _load_of(record).shape == shape]
    load = [_load_of(record) for record in routed]
    entropy = [_entropy_of(record, shape[0]) for record in routed]
    series = {name: _series(records, name) for name in NUMBERS}
    return RunLog(
        np.array([record["step"] for record in routed], np.int64),
        np.array(load, np.float32).reshape(len(routed), *shape),
        np.array(entropy, np.float32).reshape(len(routed), shape[0]),
        {name: values for name, values in series.items() if len(values[0])},
    )


def save_log(path: Path, log: RunLog) -> None:
    """Write it for open_log."""
    from safetensors.numpy import save

    arrays: dict[str, NDArray] = {
        "step_S": log.step_S, "load_SLE": log.load_SLE, "entropy_SL": log.entropy_SL,
    }  # fmt: skip
    arrays |= {f"series/{name}": np.stack(pair) for name, pair in log.series.items()}
    replace_file(path, save({n: np.ascontiguousarray(a) for n, a in arrays.items()}))


def open_log(path: Path) -> RunLog:
    """Read what save_log wrote. Raises DataError where it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}). Start launch/explore.py again."
        ) from None
    series = {
        name.removeprefix("series/"): (pair[0], pair[1])
        for name, pair in arrays.items()
        if name.startswith("series/")
    }
    return RunLog(arrays["step_S"], arrays["load_SLE"], arrays["entropy_SL"], series)


def _load_of(record: dict[str, Any]) -> NDArray:
    try:
        load_LE = np.asarray(record.get("router/load_LE", ()), np.float64)
    except (TypeError, ValueError):
        return np.zeros(0)
    is_good = load_LE.ndim == 2 and load_LE.size > 0 and bool(np.isfinite(load_LE).all())
    return load_LE if is_good and bool((load_LE >= 0).all()) else np.zeros(0)


def _entropy_of(record: dict[str, Any], num_layers: int) -> NDArray:
    try:
        entropy_L = np.asarray(record.get("router/entropy_L", ()), np.float64)
    except (TypeError, ValueError):
        entropy_L = np.zeros(0)
    return entropy_L if entropy_L.shape == (num_layers,) else np.full(num_layers, np.nan)


def _series(records: list[dict[str, Any]], name: str) -> Series:
    pairs = [(record["step"], record[name]) for record in records if _is_number(record.get(name))]
    both = np.array(pairs, np.float64).reshape(-1, 2)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
