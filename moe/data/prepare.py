"""From a configuration to a prepared folder: tokenizer.model, shards, document tables, manifest.

The sources are worked on in parts, in several processes, each result kept in a folder beside the
target (moe/data/building.py); so a kill at any moment costs the parts that were in work, and the
same command goes on. The whole folder is then renamed into place.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from moe.config import PrepareConfig
from moe.data.assemble import plan_split, write_shard
from moe.data.building import (
    building_folder,
    held,
    keep_json,
    kept_file,
    key_of,
    read_json,
    remove_building,
    remove_others,
)
from moe.data.corpus import own_line, parts_of, read_documents
from moe.data.load_tokenizer import load_tokenizer
from moe.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_NAME,
    Manifest,
    SplitEntry,
    file_entry,
    fingerprint_of,
    write_manifest,
)
from moe.data.prepared_folder import (
    existing_manifest,
    install_folder,
    is_half_replaced,
    undo_half_replacement,
)
from moe.data.selection import cut_to_bytes, first_of_each, held_out, with_every_domain
from moe.data.shards import SHARD_BYTES, token_dtype
from moe.data.source_files import BUILTIN_PYTHON, SourceFile, source_files, sources_signature
from moe.data.survey import Skips, Survey, SurveyTask, collect, survey_part
from moe.data.tokenise import TokeniseTask, packed, read_sample, sample_part, tokenise_part
from moe.data.tokenizer_training import train_tokenizer
from moe.data.work_pool import Workers, num_processes_for
from moe.errors import DataError

OnProgress = Callable[[str, int, int], None]  # (what is being done, bytes done, bytes in all)
RESULT_NAME = "prepared"  # inside the building folder: what becomes the target
KEEP_FROM_BYTES = 64 * 2**20  # of sources: after an error, less is not worth a folder that stays


def prepare(
    config: PrepareConfig, *, on_progress: OnProgress, shard_bytes: int = SHARD_BYTES
) -> Manifest:
    """Prepare config.paths.data_dir, or verify and reuse it if it has this very configuration.

    The result does not depend on num_processes, nor on how often it was begun. A folder prepared
    otherwise is refused, unless config.overwrite, and so is a folder that holds anything else, or
    that another process prepares now. Raises DataError; what was there before is then untouched.
    """
    target = Path(config.paths.data_dir).expanduser().resolve()
    build = building_folder(target)
    with _disk_errors(target):
        settings = _settings(config)
        if not is_half_replaced(target):
            existing = existing_manifest(target, settings=settings, overwrite=config.overwrite)
            if existing is not None:
                return existing
        with held(build):
            undo_half_replacement(target)
            # another process may have been first
            manifest = existing_manifest(target, settings=settings, overwrite=config.overwrite)
            if manifest is None:
                with _kept_if_worth_it(config, build):
                    manifest = _build(
                        config, build, settings=settings, on_progress=on_progress,
                        shard_bytes=shard_bytes,
                    )  # fmt: skip
                if not install_folder(build / RESULT_NAME, target, overwrite=config.overwrite):
                    raise DataError(
                        f"paths.data_dir: {target} is changed by another process; try again."
                    )
            remove_building(build)
    return manifest


def _build(
    config: PrepareConfig, build: Path, *, settings: str, on_progress: OnProgress, shard_bytes: int
) -> Manifest:
    data, seed = config.data, config.seed
    skips = Skips()
    result = build / RESULT_NAME
    result.mkdir(exist_ok=True)
    with Workers(num_processes_for(config.num_processes)) as workers:
        survey = _survey(config, build, workers, skips=skips, on_progress=on_progress)
        kept_D = first_of_each(survey.digests)
        num_again = int((~kept_D).sum())
        survey = dataclasses.replace(survey, domains=survey.domains_of(kept_D))
        _check_survey(survey, config=config, skips=skips)
        if num_again:
            skips.merge({"duplicate": (num_again, [])})
        num_domains = len(survey.domains)
        smallest = survey.smallest(kept_D)
        kept_D = cut_to_bytes(
            survey.blocks(kept_D, purpose="max_bytes"), num_domains=num_domains,
            max_bytes=data.max_bytes,
        )  # fmt: skip
        if not kept_D.any():
            raise DataError(
                f"data.max_bytes: got {data.max_bytes}; no document is that small. "
                f"The smallest has {smallest} bytes. Raise it, or set it to 0 for all."
            )
        validation_D = held_out(
            survey.blocks(kept_D, purpose="validation"), num_domains=num_domains,
            fraction=data.validation_fraction,
        )  # fmt: skip
        # one text alone: its end is held out
        is_whole = bool(validation_D.any() and (kept_D & ~validation_D).any())
        end_fraction = 0.0 if is_whole else data.validation_fraction
        validation_D &= is_whole
        train_D = kept_D & ~validation_D
        tokenizer_path = result / TOKENIZER_NAME
        plain = _Plan(survey, end_fraction, tokenizer_path, config.tokenizer.vocab_size)
        _make_tokenizer(config, plain, workers, train_D=train_D, on_progress=on_progress)
        tasks = _tokenise(plain, workers, kept_D, validation_D, on_progress=on_progress)
        splits = _write_splits(
            plain, tasks, workers, shard_bytes=shard_bytes, on_progress=on_progress
        )
    tokenizer = load_tokenizer(tokenizer_path, vocab_size=config.tokenizer.vocab_size)
    if sources_signature(data.sources) != json.loads(settings)["the files of data.sources"]:
        raise DataError(
            "data.sources: files were changed, added or removed while they were prepared; start "
            "again when nothing writes to them."
        )
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
        skipped=skips.counts(),
        settings=settings,
        fingerprint=fingerprint_of(entry, splits, dtype=dtype, domains=survey.domains),
    )
    wanted = {file.name for file in manifest.files()}
    for path in result.iterdir():
        if path.name not in wanted:
            path.unlink()
    write_manifest(manifest, result)
    return manifest


def _survey(
    config: PrepareConfig, build: Path, workers: Workers, *, skips: Skips, on_progress: OnProgress
) -> Survey:
    files: list[SourceFile] = []
    for source in config.data.sources:
        if source == BUILTIN_PYTHON:
            files.append(_builtin_file(build, skips=skips, on_progress=on_progress))
        else:
            files += source_files([source], on_skip=skips.add)
    tasks = [
        SurveyTask(part, build, config.seed, config.data.text_key, config.data.max_bad_lines)
        for part in parts_of(files)
    ]
    remove_others(build, prefix="survey-", wanted=[task.stem for task in tasks])
    _run(workers, survey_part, tasks, what="reading", on_progress=on_progress)
    return collect(tasks, skips=skips)


def _builtin_file(build: Path, *, skips: Skips, on_progress: OnProgress) -> SourceFile:
    """builtin:python as one file of documents, which parts can be cut from; 20 to 30 MB."""
    stem = f"builtin-{key_of(sys.version)}"
    path, skipped_path = build / f"{stem}.documents", build / f"{stem}.json"
    found = read_json(skipped_path)
    if found is None:
        own, size = Skips(), 0
        with kept_file(path) as file:
            for document in read_documents([BUILTIN_PYTHON], on_skip=own.add):
                size += file.write(own_line(document))
                on_progress("collecting", size, 0)
        found = own.found
        keep_json(skipped_path, found)
    skips.merge(found)
    return SourceFile(
        str(path), BUILTIN_PYTHON, "", "documents", "", True, path.stat().st_size, modified_ns=0
    )


def _check_survey(survey: Survey, *, config: PrepareConfig, skips: Skips) -> None:
    if not survey.num_documents:
        raise DataError(
            f"data.sources: no document in {list(config.data.sources)} "
            f"({skips.words() or 'no files at all'}). Give folders with text files, or files of "
            "records such as .jsonl."
        )
    if len(survey.domains) > 2**16:
        raise DataError(
            f"data.sources: {len(survey.domains)} domains; at most {2**16} are allowed."
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What every part is tokenised with."""

    survey: Survey
    end_fraction: float
    tokenizer_path: Path
    vocab_size: int

    def tasks(
        self, member_D: np.ndarray, validation_D: np.ndarray, *, tokenizer_sha256: str
    ) -> list[TokeniseTask]:
        """A task for each part."""
        number_of = {name: number for number, name in enumerate(self.survey.domains)}
        return [
            TokeniseTask(
                part, packed(member_D[part.documents]), packed(validation_D[part.documents]),
                self.end_fraction, tuple(number_of.get(name, 0) for name in part.names),
                self.tokenizer_path, tokenizer_sha256, self.vocab_size,
                token_dtype(self.vocab_size),
            )
            for part in self.survey.parts
        ]  # fmt: skip


def _make_tokenizer(
    config: PrepareConfig, plan: _Plan, workers: Workers, *, train_D: np.ndarray,
    on_progress: OnProgress,
) -> None:  # fmt: skip
    """Copy tokenizer.model_path, or train on tokenizer.train_bytes of the training documents."""
    output = plan.tokenizer_path
    if config.tokenizer.model_path is not None:
        content = Path(config.tokenizer.model_path).expanduser().read_bytes()
        with kept_file(output) as file:
            file.write(content)
        return
    survey, most = plan.survey, config.tokenizer.train_bytes
    blocks, num_domains = survey.blocks(train_D, purpose="tokenizer"), len(survey.domains)
    chosen_D = cut_to_bytes(blocks, num_domains=num_domains, max_bytes=most)
    # where each document is longer than its domain's share, one is better than none
    chosen_D = with_every_domain(chosen_D, blocks, num_domains=num_domains)
    every = plan.tasks(chosen_D, np.zeros_like(chosen_D), tokenizer_sha256="")
    tasks = [task for task in every if any(task.kept)]
    build = output.parent.parent
    stem = f"tokenizer-{key_of([task.key for task in tasks], plan.vocab_size, most)}"
    remove_others(build, prefix="tokenizer-", wanted=[stem])
    remove_others(build, prefix="sample-", wanted=[task.sample_path.stem for task in tasks])
    model_path = build / f"{stem}.model"
    total = survey.num_bytes(chosen_D)
    on_progress("training the tokenizer", 0, total)
    if not model_path.exists():
        open_tasks = [task for task in tasks if not task.sample_path.exists()]
        for _ in workers.in_order(sample_part, open_tasks):
            pass
        texts = (text[:most] for task in tasks for text in read_sample(task))
        hidden = build / ".tokenizer"
        train_tokenizer(texts, vocab_size=plan.vocab_size, output_path=hidden)
        with kept_file(model_path) as file:
            file.write(hidden.read_bytes())
    with kept_file(output) as file:
        file.write(model_path.read_bytes())
    on_progress("training the tokenizer", total, total)


def _tokenise(
    plan: _Plan, workers: Workers, kept_D: np.ndarray, validation_D: np.ndarray, *,
    on_progress: OnProgress,
) -> list[TokeniseTask]:  # fmt: skip
    sha256 = file_entry(plan.tokenizer_path).sha256
    tasks = plan.tasks(kept_D, validation_D, tokenizer_sha256=sha256)
    build = plan.tokenizer_path.parent.parent
    remove_others(build, prefix="tokens-", wanted=[task.path.name for task in tasks])
    _run(workers, tokenise_part, tasks, what="tokenising", on_progress=on_progress)
    return tasks


def _write_splits(
    plan: _Plan, tasks: list[TokeniseTask], workers: Workers, *, shard_bytes: int,
    on_progress: OnProgress,
) -> tuple[SplitEntry, ...]:  # fmt: skip
    result, domains = plan.tokenizer_path.parent, plan.survey.domains
    plans = [
        plan_split(tasks, split, folder=result, num_domains=len(domains), shard_bytes=shard_bytes)
        for split in SPLITS
    ]
    empty = [split.name for split in plans if not split.shards]
    if empty:
        raise DataError(
            f"data.sources: nothing is left for {empty[0]}: the text of one origin is too short "
            "to hold its end out. Add text, or raise data.max_bytes."
        )
    shards = [shard for split in plans for shard in split.shards]
    remove_others(
        result.parent, prefix="shard-", wanted=[shard.entry_path.stem for shard in shards]
    )
    _run(workers, write_shard, shards, what="writing", on_progress=on_progress)
    entries = [[shard.entry() for shard in split.shards] for split in plans]
    return tuple(
        split.entry(found, domains=domains) for split, found in zip(plans, entries, strict=True)
    )


class _Task(Protocol):
    @property
    def num_bytes(self) -> int: ...
    @property
    def is_kept(self) -> bool: ...


_AnyTask = TypeVar("_AnyTask", bound=_Task)


def _run(
    workers: Workers, function: Callable[[_AnyTask], object], tasks: Sequence[_AnyTask], *,
    what: str, on_progress: OnProgress,
) -> None:  # fmt: skip
    """Do the tasks whose results are not kept from before."""
    missing = [task for task in tasks if not task.is_kept]
    total = sum(task.num_bytes for task in tasks)
    done = total - sum(task.num_bytes for task in missing)
    on_progress(what, done, total)
    for task, _ in zip(missing, workers.in_order(function, missing), strict=True):
        done += task.num_bytes
        on_progress(what, done, total)


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
    # keys that came later are named only where they differ, so that older folders are still reused
    if config.data.text_key != "text":
        settings["data.text_key"] = config.data.text_key
    if config.data.max_bad_lines:
        settings["data.max_bad_lines"] = config.data.max_bad_lines
    if model_path is None:
        settings["tokenizer.train_bytes"] = config.tokenizer.train_bytes
    else:
        tokenizer = load_tokenizer(
            Path(model_path).expanduser(), vocab_size=config.tokenizer.vocab_size
        )
        settings["tokenizer.model_path (SHA-256)"] = tokenizer.sha256
    return json.dumps(settings, sort_keys=True)


@contextmanager
def _kept_if_worth_it(config: PrepareConfig, build: Path) -> Iterator[None]:
    """After an error, remove the work on a small text; of a large one, say where it is."""
    try:
        yield
    except BaseException as error:
        if _source_bytes(config) < KEEP_FROM_BYTES:
            remove_building(build)
            raise
        if isinstance(error, DataError):
            raise DataError(
                f"{error} What is done is kept in {build} for the same command."
            ) from None
        raise


def _source_bytes(config: PrepareConfig) -> int:
    sources = [source for source in config.data.sources if source != BUILTIN_PYTHON]
    try:
        return sum(file.num_bytes for file in source_files(sources, on_skip=lambda *_: None))
    except DataError:
        return KEEP_FROM_BYTES  # a source has gone meanwhile; it may come back


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
