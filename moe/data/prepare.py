"""From a configuration to a prepared folder: tokenizer.model, shards, document tables, manifest.

Everything is built in a folder beside the target and renamed into place when it is complete, so
a stop at any moment leaves what was there before.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from moe.config import PrepareConfig
from moe.data.load_tokenizer import load_tokenizer
from moe.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    DomainCount,
    Manifest,
    SkipCount,
    SplitEntry,
    file_entry,
    fingerprint_of,
    write_manifest,
)
from moe.data.prepared_folder import existing_manifest, install_folder, undo_half_replacement
from moe.data.selection import cut_to_bytes, group_draws, held_out
from moe.data.shards import SHARD_BYTES, SplitWriter, token_dtype
from moe.data.source_files import sources_signature
from moe.data.survey import Survey, cut_survey, read_sources, texts_of
from moe.data.tokenise import num_processes_for, tokenise
from moe.data.tokenizer_training import train_tokenizer
from moe.errors import DataError

OnProgress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all or 0)
TEXT_NAME = "corpus.text"  # all text one after another while it is prepared; removed at the end


def prepare(
    config: PrepareConfig, *, on_progress: OnProgress, shard_bytes: int = SHARD_BYTES
) -> Manifest:
    """Prepare config.paths.data_dir, or verify and reuse it if it has this very configuration.

    The result does not depend on num_processes. A folder prepared otherwise is refused, unless
    config.overwrite, and so is a folder that holds anything else. Raises DataError; what was there
    before is then untouched.
    """
    target = Path(config.paths.data_dir).expanduser().resolve()
    with _disk_errors(target):
        settings = _settings(config)
        undo_half_replacement(target)
        existing = existing_manifest(target, settings=settings, overwrite=config.overwrite)
        if existing is not None:
            return existing
        target.parent.mkdir(parents=True, exist_ok=True)
        build = target.with_name(f".{target.name}.building-{uuid.uuid4().hex[:12]}")
        build.mkdir()
        try:
            manifest = _build(
                config, build, settings=settings, on_progress=on_progress, shard_bytes=shard_bytes
            )
            installed = install_folder(build, target, overwrite=config.overwrite)
        except BaseException:
            shutil.rmtree(build, ignore_errors=True)
            raise
        if installed:
            return manifest
        # another process prepared the same folder in the meantime
        shutil.rmtree(build)
        existing = existing_manifest(target, settings=settings, overwrite=False)
    if existing is None:
        raise DataError(f"paths.data_dir: {target} is changed by another process; try again.")
    return existing


def _build(
    config: PrepareConfig, build: Path, *, settings: str, on_progress: OnProgress, shard_bytes: int
) -> Manifest:
    data, seed = config.data, config.seed
    text_path = build / TEXT_NAME
    everything = read_sources(
        data.sources, text_path, on_read=lambda done: on_progress("reading", done, 0)
    )
    survey = cut_survey(everything, max_bytes=data.max_bytes, seed=seed)
    validation_D = held_out(
        survey.groups, domain_D=survey.domain_D, fraction=data.validation_fraction, seed=seed
    )
    tokenizer_path = build / TOKENIZER_NAME
    _make_tokenizer(
        config, survey, text_path, train_D=~validation_D, output=tokenizer_path,
        on_progress=on_progress,
    )  # fmt: skip
    tokenizer = load_tokenizer(tokenizer_path, vocab_size=config.tokenizer.vocab_size)
    splits = _write_splits(
        config, survey, text_path, validation_D=validation_D, tokenizer_path=tokenizer_path,
        on_progress=on_progress, shard_bytes=shard_bytes,
    )  # fmt: skip
    text_path.unlink()
    entry, dtype = file_entry(tokenizer_path), token_dtype(tokenizer.vocab_size)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        seed=seed,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        end_of_text_id=tokenizer.end_of_text_id,
        domains=survey.domains,
        tokenizer=entry,
        splits=splits,
        sources=data.sources,
        skipped=tuple(SkipCount(reason, n) for reason, n in sorted(survey.skipped.items())),
        settings=settings,
        fingerprint=fingerprint_of(entry, splits, dtype=dtype, domains=survey.domains),
    )
    write_manifest(manifest, build)
    return manifest


def _make_tokenizer(
    config: PrepareConfig, survey: Survey, text_path: Path, *, train_D: np.ndarray, output: Path,
    on_progress: OnProgress,
) -> None:  # fmt: skip
    """Copy tokenizer.model_path, or train on tokenizer.train_bytes of the training documents."""
    if config.tokenizer.model_path is not None:
        source = Path(config.tokenizer.model_path).expanduser()
        load_tokenizer(source, vocab_size=config.tokenizer.vocab_size)
        output.write_bytes(source.read_bytes())
    else:
        draw_D = group_draws(survey.groups, seed=config.seed, purpose="tokenizer")
        train = np.flatnonzero(train_D)
        kept = train[
            cut_to_bytes(
                draw_D[train], domain_D=survey.domain_D[train], size_D=survey.size_D[train],
                max_bytes=config.tokenizer.train_bytes,
            )
        ]  # fmt: skip
        # every document may be longer than its domain's share; then any text is better than none
        chosen = kept if len(kept) else train[np.argsort(survey.size_D[train])[:1]]
        total = int(survey.size_D[chosen].sum())
        on_progress("training the tokenizer", 0, total)
        texts = texts_of(text_path, [survey.spans[d] for d in chosen])
        train_tokenizer(texts, vocab_size=config.tokenizer.vocab_size, output_path=output)
        on_progress("training the tokenizer", total, total)
    with output.open("rb") as file:
        os.fsync(file.fileno())


def _write_splits(
    config: PrepareConfig, survey: Survey, text_path: Path, *, validation_D: np.ndarray,
    tokenizer_path: Path, on_progress: OnProgress, shard_bytes: int,
) -> tuple[SplitEntry, ...]:  # fmt: skip
    vocab_size = config.tokenizer.vocab_size
    total, done = int(survey.size_D.sum()), 0
    entries = []
    for split, member_D in zip(SPLITS, (~validation_D, validation_D), strict=True):
        members = np.flatnonzero(member_D)
        stream = tokenise(
            text_path, [survey.spans[d] for d in members], tokenizer_path=tokenizer_path,
            vocab_size=vocab_size, num_processes=num_processes_for(config.num_processes),
        )  # fmt: skip
        dtype = token_dtype(vocab_size)
        with SplitWriter(text_path.parent, split, dtype=dtype, shard_bytes=shard_bytes) as writer:
            for document, tokens in zip(members, stream, strict=True):
                size = int(survey.size_D[document])
                writer.add(tokens, num_bytes=size, domain=int(survey.domain_D[document]))
                done += size
                on_progress("tokenising", done, total)
            shards, table_entry, table = writer.finish()
        counts = tuple(
            _count(table[table["domain"] == number], name)
            for number, name in enumerate(survey.domains)
        )
        entries.append(
            SplitEntry(
                split, shards, table_entry, len(table), int(table["tokens"].sum()),
                int(table["bytes"].sum()), counts,
            )
        )  # fmt: skip
    return tuple(entries)


def _count(rows: np.ndarray, name: str) -> DomainCount:
    return DomainCount(name, len(rows), int(rows["tokens"].sum()), int(rows["bytes"].sum()))


def _settings(config: PrepareConfig) -> str:
    """The configuration keys that decide the content, as sorted JSON."""
    model_path = config.tokenizer.model_path
    settings: dict[str, object] = {
        "seed": config.seed,
        "data.sources": list(config.data.sources),
        "data.max_bytes": config.data.max_bytes,
        "data.validation_fraction": config.data.validation_fraction,
        "tokenizer.vocab_size": config.tokenizer.vocab_size,
        "the files of data.sources": sources_signature(config.data.sources),
    }
    if model_path is None:
        settings["tokenizer.train_bytes"] = config.tokenizer.train_bytes
    else:
        tokenizer = load_tokenizer(
            Path(model_path).expanduser(), vocab_size=config.tokenizer.vocab_size
        )
        settings["tokenizer.model_path (SHA-256)"] = tokenizer.sha256
    return json.dumps(settings, sort_keys=True)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        raise DataError(
            f"paths.data_dir: {target} cannot be written: {error.strerror or error}{where}. Free "
            "some space or choose a folder that can be written; what was there before is unchanged."
        ) from None
