"""Run a model over a prepared folder's documents and write the experts that each token takes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe.data.shards import TokenSplit
from moe.errors import ConfigError, DataError
from moe.load_run import LoadedRun
from moe.model.transformer import Transformer
from moe.sparse.router import Routing
from moe.trace import folder
from moe.trace.documents import choose_documents, empty_domains, load_batch, shorten
from moe.trace.info import SCHEMA_VERSION, PartEntry, TraceInfo
from moe.trace.read import open_trace
from moe.trace.vocabulary import vocabulary_bytes
from moe.trace.write import ROW_GROUP_TOKENS, PartLabel, TraceWriter
from moe.trace_config import TraceConfig
from moe.train.checkpoint_manifest import tensor_files
from moe.train.progress import OnProgress


@dataclass(frozen=True)
class Traced:
    """What trace_corpus did; resumed_tokens were there already."""

    info: TraceInfo
    resumed_tokens: int
    was_finished: bool


def trace_corpus(
    config: TraceConfig,
    run: LoadedRun,
    split: TokenSplit,
    *,
    on_progress: OnProgress,
    on_note: Callable[[str], None],
) -> Traced:
    """Write the trace of config.target, or what an interrupted one lacks; every part is atomic.

    Raises ConfigError where the model is dense, a number does not fit it, or the folder holds
    something else; DataError where the text does not fit the model, or a finished trace is damaged.
    """
    wanted, target = describe(config, run, split), Path(config.target).expanduser()
    for name in empty_domains(split):
        on_note(f"domain {name!r} has no documents in the {split.name} split, so none are traced.")
    batches = choose_documents(
        split,
        seq_len=wanted.setting("seq_len"),
        max_tokens=config.max_tokens,
        batch_size=config.batch_size,
        domains=config.domains,
    )
    with folder.locked(target):
        if folder.find_finished(target, wanted) is not None:
            trace = open_trace(target)
            trace.verify()
            return Traced(trace.info, trace.info.num_tokens, True)
        vocabulary = None if run.tokenizer is None else vocabulary_bytes(run.tokenizer)
        begun = folder.begin(target, wanted, vocabulary=vocabulary, on_note=on_note)
        info = _go_on(config, run, split, batches, target, begun, on_progress=on_progress)
        folder.end(target, info)
    return Traced(info, begun.num_tokens, False)


def describe(config: TraceConfig, run: LoadedRun, split: TokenSplit) -> TraceInfo:
    """What the trace will say of itself, without any part. Raises ConfigError and DataError."""
    model, manifest = run.config.model, split.manifest
    if not model.is_sparse:
        raise ConfigError(
            f"run: model {model.name} is dense: it has no experts, so there is no routing to "
            "trace. Give a run whose model has model.num_experts above 0."
        )
    _refuse_other_text(run, split)
    settings = {
        "run": config.run, "checkpoint": str(run.checkpoint.folder), "step": run.checkpoint.step,
        "model": model.name, "router": run.config.router.name,
        "mask_threshold": run.config.router.mask_threshold,
        "data_dir": str(split.data_dir), "split": split.name, "domains": list(config.domains),
        "max_tokens": config.max_tokens, "seq_len": run.window(config.seq_len),
        "batch_size": config.batch_size, "logits": config.logits,
        "part_tokens": config.part_tokens, "row_group_tokens": ROW_GROUP_TOKENS,
        "precision": str(run.precision).removeprefix("torch."),
        "pad_id": manifest.end_of_text_id, "tokenizer_sha256": manifest.tokenizer.sha256,
    }  # fmt: skip
    return TraceInfo(
        schema_version=SCHEMA_VERSION,
        kind="documents",
        num_layers=model.num_layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        has_logits=config.logits,
        domains=split.domains,
        model_sha256=model_sha256(run),
        data_fingerprint=manifest.fingerprint,
        settings=json.dumps(settings),
    )


def model_sha256(run: LoadedRun) -> str:
    """SHA-256 over the hashes of the parameters' files and the numbers that decide the routing."""
    router, manifest = run.config.router, run.checkpoint.manifest
    names = set(tensor_files(manifest, "model"))
    content = {
        "files": {file.name: file.sha256 for file in manifest.files if file.name in names},
        "model": dataclasses.asdict(run.config.model),
        "router": [router.name, router.mask_threshold, router.renormalise],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _go_on(
    config: TraceConfig,
    run: LoadedRun,
    split: TokenSplit,
    batches: list[np.ndarray],
    target: Path,
    info: TraceInfo,
    *,
    on_progress: OnProgress,
) -> TraceInfo:
    """Trace the batches that the parts of info do not hold; returns info with all parts."""
    seq_len = info.setting("seq_len")
    lengths = shorten(split, seq_len).documents["tokens"].astype(np.int64)
    total = sum(int(lengths[numbers_B].sum()) for numbers_B in batches)
    num_done, part_number, in_part = info.num_tokens, len(info.parts), 0

    def on_part(part: PartEntry) -> None:
        nonlocal info
        info = folder.add_part(target, info, part)

    first = sum(part.num_batches for part in info.parts)
    with TraceWriter(target, info.layout, num_domains=len(info.domains), on_part=on_part) as writer:
        for numbers_B in batches[first:]:
            num_tokens = int(lengths[numbers_B].sum())
            if in_part and in_part + num_tokens > config.part_tokens:
                part_number, in_part = part_number + 1, 0
            tokens_BS, rows = load_batch(split, numbers_B, seq_len=seq_len)
            position_BS = torch.from_numpy(rows.position_T).view_as(tokens_BS)
            routings, seconds = route(
                run.model, tokens_BS, position_BS=position_BS, precision=run.precision
            )
            label = PartLabel(folder.part_name(part_number))
            writer.put(label, rows, routings, forward_seconds=seconds)
            in_part, num_done = in_part + num_tokens, num_done + num_tokens
            on_progress("tokens", num_done, total)
    return info


@torch.no_grad()
def route(
    model: Transformer,
    tokens_BS: torch.Tensor,
    *,
    position_BS: torch.Tensor,
    precision: torch.dtype,
) -> tuple[tuple[Routing, ...], float]:
    """Each layer's routing of every place, and the seconds that the forward pass took."""
    device = model.embed.weight.device
    started = time.perf_counter()
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        output = model(
            tokens_BS.to(device), position_BS=position_BS.to(device), last_only=True, route_all=True
        )
    if device.type == "cuda":
        torch.cuda.synchronize()  # syncs: the pass is timed; the next one is long beside the wait
    return output.routings, time.perf_counter() - started


def _refuse_other_text(run: LoadedRun, split: TokenSplit) -> None:
    """The same ids must mean the same text; of a model without a tokenizer, they must exist."""
    manifest = split.manifest
    if run.tokenizer is not None:
        run.require_tokenizer_of(split, key="data_dir")
    if manifest.vocab_size > run.config.model.vocab_size:
        raise DataError(
            f"data_dir: {split.data_dir} was made by a tokenizer of {manifest.vocab_size} ids; the "
            f"model has {run.config.model.vocab_size}. Prepare the text with the model's own."
        )
