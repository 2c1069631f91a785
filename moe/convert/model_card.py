"""README.md of an exported model: what it is, how it was made, how to load it."""

from __future__ import annotations

import contextlib
from typing import Any

from moe.convert.hf_config import family_of
from moe.errors import DataError
from moe.load_run import OpenedRun
from moe.model_config import ModelConfig
from moe.train.metrics import METRICS_FILE, stream_metrics

_NATIVE = {"phi3": "Phi3ForCausalLM", "phimoe": "PhimoeForCausalLM"}


def model_card(opened: OpenedRun, *, window: str, has_tokenizer: bool) -> bytes:
    """The card as Markdown in UTF-8, with the header that model hubs read."""
    model = opened.config.model
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {model.name}",
        "",
        _what_it_is(model, opened),
        "",
        *_shape(model, opened),
        "",
        "## Where it comes from",
        "",
        *_history(opened),
        "",
        "The licence is that of whoever made the weights; this converter adds no terms. Say which",
        "one it is before you publish this folder.",
        "",
        "## How to load it",
        "",
        *_loading(model, window=window, has_tokenizer=has_tokenizer),
    ]
    return "\n".join(lines).encode() + b"\n"


def _what_it_is(model: ModelConfig, opened: OpenedRun) -> str:
    total, active = model.num_parameters(), model.num_parameters(active=True)
    if not model.is_sparse:
        return f"A dense decoder of the Phi-3 family with {total:,} parameters."
    return (
        f"A decoder of the Phi-3 family with {total:,} parameters, of which each token uses "
        f"{active:,}: {model.num_experts} experts in each layer, {model.top_k} for a token."
    )


def _shape(model: ModelConfig, opened: OpenedRun) -> list[str]:
    rope = model.rope
    positions = f"rotary, theta {rope.theta:g}"
    if rope.long_factor is not None:
        positions += f", LongRoPE: short factors up to {rope.original_max_position:,}"
    rows: list[tuple[str, object]] = [
        ("layers", model.num_layers),
        ("width", model.hidden_size),
        ("heads", f"{model.num_heads} (keys and values: {model.num_kv_heads}) of {model.head_dim}"),
        ("feed-forward", f"{model.feed_forward}, {model.intermediate_size} wide"),
        ("vocabulary", f"{model.vocab_size:,} rows"),
        ("positions", positions),
        ("longest text", f"{model.usable_length:,} tokens"),
    ]
    if model.sliding_window is not None:
        rows.append(("sliding window", f"a query sees {model.sliding_window:,} keys, itself too"))
    if model.is_sparse:
        router = opened.config.router
        rows.append(("router", f"{router.name}, threshold {router.mask_threshold:g}"))
    rows.append(("numbers", str(opened.dtype).removeprefix("torch.")))
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]


def _history(opened: OpenedRun) -> list[str]:
    state = opened.checkpoint.state
    origin = state.get("origin")
    if origin:
        return [f"Imported from a published folder named `{origin['folder']}` and exported again."]
    train: dict[str, Any] = state["train"]
    lines = [
        f"Trained with phimoe: run `{opened.config.name}`, step {train['step']:,}, "
        f"{train['tokens_seen']:,} tokens seen, seed {opened.config.seed}, "
        f"sequences of {opened.config.data.seq_len}, {train['precision']}."
    ]
    loss = _validation_loss(opened)
    if loss is not None:
        lines.append(f"Validation loss at that step: {loss:.4f} nats a token.")
    return lines


def _validation_loss(opened: OpenedRun) -> float | None:
    path = opened.checkpoint.folder.parent.parent / METRICS_FILE
    found: list[float] = []
    with contextlib.suppress(DataError):  # a converted model has no log
        found += (
            record["validation/loss"]
            for record in stream_metrics(path)
            if record["step"] == opened.checkpoint.step and "validation/loss" in record
        )
    return found[-1] if found else None


def _loading(model: ModelConfig, *, window: str, has_tokenizer: bool) -> list[str]:
    family = family_of(model)
    lines = []
    if family in _NATIVE:
        lines += [
            f"transformers has this architecture ({_NATIVE[family]}); no remote code is needed:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM"
            + (", AutoTokenizer" if has_tokenizer else ""),
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
            *(['tokenizer = AutoTokenizer.from_pretrained("FOLDER")'] if has_tokenizer else []),
            "```",
        ]
    else:
        lines += [
            "transformers has no class for this architecture (phi3small): the tensors have the",
            "published names and order, and the publisher's own modelling code opens them.",
        ]
    if family == "phimoe" and model.rope.long_factor is not None:
        lines += [
            "",
            f"transformers 5.23 uses the short rotary factors beyond {_length(model)} tokens too,",
            "which is not what the model was trained with; 4.57 and phimoe use the long ones.",
        ]
    if model.sliding_window is not None:
        shown = model.sliding_window - (window == "original")
        lines += [
            "",
            f"config.json says sliding_window {shown}, as the {window} code counts it. The",
            "original FlashAttention code shows one key more than the number; transformers since",
            "4.57 shows exactly that many.",
        ]
    if not has_tokenizer:
        lines += ["", "There is no tokenizer in this folder: add the published one."]
    lines += [
        "",
        "With phimoe itself:",
        "",
        "```",
        f"python launch/convert.py source=FOLDER target=CONVERTED window={window}",
        "python launch/generate.py run=CONVERTED prompt=TEXT",
        "```",
    ]
    return lines


def _length(model: ModelConfig) -> str:
    return f"{model.rope.original_max_position:,}"
