"""What a model needs, as the lines that launch/inspect_model.py prints."""

from __future__ import annotations

from moe.config import RouterConfig
from moe.model_config import ModelConfig
from moe.model_flops import all_visible_pairs, decode_flops, forward_flops_per_token
from moe.model_report import (
    BYTES,
    TRAINING_BYTES_PER_PARAMETER,
    cache_size,
    inference_activations,
    training_activations,
)
from moe.train.throughput import model_flops_per_token

_NAME_WIDTH, _COLUMN = 30, 20
_SUMS = ("all", "activations", "forward")  # rows under a rule
Row = tuple[str, ...]


def model_tables(
    model: ModelConfig, router: RouterConfig, *, batch_size: int, seq_len: int, dtype: str
) -> list[str]:
    """Parameters, memory and operations of a model for a batch of texts of seq_len tokens."""
    texts = f"{batch_size} text{'s' if batch_size > 1 else ''} of {seq_len:,} tokens"
    sections = [
        (f"parameters, bytes in {dtype}", ("total", "active", "bytes"), _parameters(model, dtype)),
        (
            f"key-value cache, {texts}, {dtype}",
            ("bytes",),
            _cache(model, batch_size=batch_size, seq_len=seq_len, dtype=dtype),
        ),
        (
            f"inference, {texts}, {dtype}",
            ("bytes",),
            _inference(model, batch_size=batch_size, seq_len=seq_len, dtype=dtype),
        ),
        (
            f"a training step, {texts}, {_training_words(dtype)}",
            ("kept", "recomputed"),
            _training(model, router, batch_size=batch_size, seq_len=seq_len, dtype=dtype),
        ),
        (f"FLOPs of a token, text of {seq_len:,}", ("forward", "share"), _flops(model, seq_len)),
    ]
    lines: list[str] = []
    for title, heads, rows in sections:
        lines += ["", *_table(title, heads, rows)]
    return lines


def _parameters(model: ModelConfig, dtype: str) -> list[Row]:
    total, active = model.parameter_table(), model.parameter_table(active=True)
    rows = [
        (part, f"{count:,}", f"{active[part]:,}", in_words(count * BYTES[dtype]))
        for part, count in total.items()
    ]
    count = sum(total.values())
    used = f"{sum(active.values()):,}"
    return [*rows, ("all", f"{count:,}", used, in_words(count * BYTES[dtype]))]


def _cache(model: ModelConfig, *, batch_size: int, seq_len: int, dtype: str) -> list[Row]:
    size = cache_size(model, batch_size=batch_size, seq_len=seq_len, dtype=dtype)
    rows = [("allocated, every place", in_words(size.allocated))]
    if size.needed < size.allocated:
        rows.append(("what the next token sees of it", in_words(size.needed)))
    one = cache_size(model, batch_size=1, seq_len=1, dtype=dtype).allocated
    return [*rows, ("a token", in_words(one))]


def _inference(model: ModelConfig, *, batch_size: int, seq_len: int, dtype: str) -> list[Row]:
    size: dict[str, int] = {
        "weights": model.num_parameters() * BYTES[dtype],
        "cache": cache_size(model, batch_size=batch_size, seq_len=seq_len, dtype=dtype).allocated,
        "largest moment of a prefill": inference_activations(
            model, batch_size=batch_size, seq_len=seq_len, dtype=dtype
        ),
    }
    return [(part, in_words(count)) for part, count in (size | {"all": sum(size.values())}).items()]


def _training(
    model: ModelConfig, router: RouterConfig, *, batch_size: int, seq_len: int, dtype: str
) -> list[Row]:
    kept, recomputed = (
        training_activations(
            model, router, batch_size=batch_size, seq_len=seq_len, dtype=dtype, recompute=recompute
        )
        for recompute in (False, True)
    )
    rows: list[Row] = []
    for part in [*kept, *(part for part in recomputed if part not in kept)]:
        if part.endswith(", one layer"):
            continue
        again = recomputed.get(f"{part}, one layer", recomputed.get(part))
        was = in_words(kept[part]) if part in kept else "-"
        rows.append((part, was, in_words(again) if again is not None else "-"))
    state = TRAINING_BYTES_PER_PARAMETER * model.num_parameters()
    rows.append(("activations", in_words(sum(kept.values())), in_words(sum(recomputed.values()))))
    rows.append(("weights, gradients, AdamW", in_words(state), in_words(state)))
    rows.append(
        (
            "all",
            in_words(state + sum(kept.values())),
            in_words(state + sum(recomputed.values())),
        )
    )
    return rows


def _training_words(dtype: str) -> str:
    return "float32" if dtype == "float32" else f"{dtype} autocast"


def _flops(model: ModelConfig, seq_len: int) -> list[Row]:
    table = forward_flops_per_token(model, seq_len)
    total = sum(table.values())
    rows: list[Row] = [
        (part, count_in_words(flops), f"{flops / total:.1%}") for part, flops in table.items()
    ]
    rows.append(("forward", count_in_words(total), "100.0%"))
    training = model_flops_per_token(model, seq_len)
    rows.append(("training, forward + backward", count_in_words(training), ""))
    rows.append(
        (f"the token after {seq_len:,} cached", count_in_words(decode_flops(model, seq_len)), "")
    )
    causal = model.num_layers * model.num_heads * seq_len * (seq_len + 1) // 2
    density = all_visible_pairs(model, seq_len) / causal
    if density < 1.0:
        rows.append(("pairs seen, of causal ones", "", f"{density:.1%}"))
    return rows


def _table(title: str, heads: tuple[str, ...], rows: list[Row]) -> list[str]:
    """A title, the columns' names, a rule, and the rows, with a rule above each sum."""
    width = max(_NAME_WIDTH, *(len(row[0]) + 2 for row in rows))
    lines = [title, f"{'':<{width}}" + "".join(f"{head:>{_COLUMN}}" for head in heads)]
    lines.append("-" * (width + _COLUMN * len(heads)))
    for row in rows:
        if row[0] in _SUMS:
            lines.append("-" * (width + _COLUMN * len(heads)))
        cells = "".join(f"{cell:>{_COLUMN}}" for cell in row[1:])
        lines.append(f"{row[0]:<{width}}{cells}".rstrip())
    return lines


def in_words(num_bytes: int) -> str:
    """Bytes in units of 1,024, with three or four digits: 83.7 GiB."""
    size, units = float(num_bytes), ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    for unit in units:
        if size < 1024 or unit == units[-1]:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes every size")


def count_in_words(count: float) -> str:
    """Operations in thousands, millions, ...: 13.3 G."""
    units = ("", " K", " M", " G", " T", " P")
    for unit in units:
        if count < 1000 or unit == units[-1]:
            return f"{count:,.2f}{unit}"
        count /= 1000
    raise AssertionError("the last unit takes every count")
