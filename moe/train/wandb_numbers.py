"""Which numbers of a run W&B shows, under what names, and over which axis.

W&B makes a section of panels of what stands before the first "/" and a panel of every name. So the
records of metrics.jsonl get other names here, and few: at most _MAX_LAYERS layers and _MAX_DOMAINS
domains have panels of their own, whatever the model and the data are.

    section      names, and the metrics.jsonl key where it is another                     axis
    loss         train (loss); of a model with experts total, balance, z                  tokens
    validation   loss, perplexity, bits_per_byte                                          tokens
    domains      loss/NAME, bits_per_byte/NAME (validation/loss/NAME, ...)                tokens
    optim        lr, grad_norm, skipped                                                   step
    router       entropy, entropy_min, load_cv, diversity, max_load, min_load,            step
                 dead_experts; of router/load_LE and router/entropy_L
    layers       entropy/NN of some layers, first and last among them                     step
    throughput   tokens_per_second, step_seconds, mfu, memory_gib, trace_seconds          step
    checkpoint   stall_seconds, waited_seconds, write_seconds, bytes                      step

Runs of other batch sizes compare over tokens: that axis is the number `tokens` (tokens_seen).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moe.train.metrics import Record

Number = float | int | bool

TOKENS = "tokens"
OVER_TOKENS = ("loss/*", "validation/*", "domains/*")
_MAX_LAYERS = 8
_MAX_DOMAINS = 12
_NAMES = {
    "loss": "loss/train",
    "tokens_seen": TOKENS,
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "skipped": "optim/skipped",
    "tokens_per_second": "throughput/tokens_per_second",
    "step_seconds": "throughput/step_seconds",
    "mfu": "throughput/mfu",
    "memory_gib": "throughput/memory_gib",
    "trace/seconds": "throughput/trace_seconds",
}
# the same in every record, or no number at all
_NO_CURVES = (
    "step", "kind", "data_hash", "checkpoint/step", "validation/unigram_entropy",
    "validation/unigram_bits_per_byte", "validation/tokens",
)  # fmt: skip
_ONLY_SPARSE = ("loss/total", "loss/balance", "loss/z")  # without experts: the loss again, and 0
_BY_DOMAIN = ("validation/loss/", "validation/bits_per_byte/")


def curves(record: Record) -> dict[str, Number]:
    """The numbers of a record of metrics.jsonl that become points of curves, by W&B name.

    A number of a key that is not known here, as it is where somebody adds one, keeps its name; one
    without a section is put under other/.
    """
    is_dense_step = record.get("kind") == "train" and not record.get("router/load_LE")
    shown: dict[str, Number] = {}
    for key, value in record.items():
        if key in _NO_CURVES or not isinstance(value, (bool, int, float)):
            continue
        if key.startswith(_BY_DOMAIN) or (is_dense_step and key in _ONLY_SPARSE):
            continue
        shown[_NAMES.get(key, key if "/" in key else f"other/{key}")] = value
    return shown | _of_domains(record) | _of_load(record) | _of_entropy(record)


def summary(record: Record) -> dict[str, float]:
    """What a validation says of a whole run: its table has it, and no panel."""
    names = ("validation/unigram_entropy", "validation/unigram_bits_per_byte", "validation/tokens")
    return {
        f"data/{name.partition('/')[2]}": float(record[name]) for name in names if name in record
    }


def shown_layers(num_layers: int) -> list[int]:
    """The layers with panels of their own: all of few, else evenly spaced with both ends."""
    if num_layers <= _MAX_LAYERS:
        return list(range(num_layers))
    return [round(i * (num_layers - 1) / (_MAX_LAYERS - 1)) for i in range(_MAX_LAYERS)]


def _of_domains(record: Record) -> dict[str, Number]:
    """Loss and bits per byte of the first domains, in the order of the data."""
    shown: dict[str, Number] = {}
    for start in _BY_DOMAIN:
        keys = [key for key in record if key.startswith(start)][:_MAX_DOMAINS]
        kind = start.split("/")[1]
        shown |= {f"domains/{kind}/{key.removeprefix(start)}": record[key] for key in keys}
    return shown


def _of_load(record: Record) -> dict[str, Number]:
    """Over all layers; definitions are those of analysis/utilisation.py, which is tested."""
    ratio_LE = load_ratios(record)
    if ratio_LE is None:
        return {}
    share_LE = ratio_LE / ratio_LE.shape[1]
    logarithm = np.log(np.where(share_LE > 0, share_LE, 1.0))
    effective_L = np.exp(-(share_LE * logarithm).sum(axis=1)) / ratio_LE.shape[1]
    return {
        "router/max_load": float(ratio_LE.max()),
        "router/min_load": float(ratio_LE.min()),
        "router/load_cv": float(ratio_LE.std(axis=1).mean()),
        "router/diversity": float(effective_L.mean()),
    }


def load_ratios(record: Record) -> np.ndarray | None:
    """(L, E): an expert's share of its layer's rows over the ideal share 1/E; None if not there."""
    load_LE: Any = record.get("router/load_LE")
    if not load_LE:
        return None
    ratio_LE = np.asarray(load_LE, dtype=np.float64)
    if ratio_LE.ndim != 2 or ratio_LE.size == 0:
        return None
    return np.nan_to_num(ratio_LE, nan=0.0) * ratio_LE.shape[1]


def _of_entropy(record: Record) -> dict[str, Number]:
    """Of the router's softmax, nats: its mean and least layer, and some layers alone."""
    entropy_L = [float(entropy) for entropy in record.get("router/entropy_L") or ()]
    if not entropy_L:
        return {}
    width = max(2, len(str(len(entropy_L) - 1)))
    shown: dict[str, Number] = {
        f"layers/entropy/{layer:0{width}d}": entropy_L[layer]
        for layer in shown_layers(len(entropy_L))
    }
    return shown | {
        "router/entropy": sum(entropy_L) / len(entropy_L),
        "router/entropy_min": min(entropy_L),
    }
