"""May this run start here? Asked by all ranks together, before anything is built or written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from moe.config import TrainConfig
from moe.data.load_tokenizer import TextTokenizer, load_tokenizer
from moe.data.manifest import TOKENIZER_NAME, Manifest
from moe.data.shards import TokenSplit
from moe.errors import CheckpointError, ConfigError, UserError, place_advice
from moe.parallel.processes import Processes
from moe.plan.layout import layout_of
from moe.plan.memory import state_bytes
from moe.plan.report import in_words
from moe.progress_call import ProgressCall
from moe.train.checkpoint import Checkpoint, find_checkpoint
from moe.train.checkpoint_manifest import tensor_files
from moe.train.run_place import taken_place
from moe.train.state import refuse_other_run

# of what moe/plan counts; buffers that a library may make smaller are not held against anybody
_STAYS = ("parameters", "masters", "Adam's moments")


@contextlib.contextmanager
def run_folder(run_dir: str, processes: Processes, *, may_rename: bool) -> Iterator[Path]:
    """Yield the folder that this run alone has until the block ends; rank 0 takes it for all.

    may_rename: as in taken_place. Raises the same ConfigError on every rank.
    """
    with contextlib.ExitStack() as stack:
        told = {"folder": "", "error": ""}
        if processes.is_first:
            try:
                taken = stack.enter_context(taken_place(run_dir, may_rename=may_rename))
                told["folder"] = str(taken)
            except UserError as error:
                told["error"] = str(error)
            except OSError as error:
                told["error"] = (
                    f"paths.run_dir: cannot write {error.filename or run_dir}: {error.strerror}. "
                    f"{place_advice(error, 'paths.run_dir')}"
                )
        told = json.loads(processes.from_first(json.dumps(told)))
        if told["error"]:
            raise ConfigError(told["error"])
        yield Path(told["folder"])


def checkpoint_to_resume(
    config: TrainConfig,
    run_dir: Path,
    processes: Processes,
    *,
    fingerprint: str,
    say: Callable[[str], None],
    progress: ProgressCall,
) -> Checkpoint | None:
    """Find the newest good checkpoint, if any; refuse another run's before building anything."""
    checkpoint = find_checkpoint(
        run_dir / "checkpoints",
        on_skip=lambda why: say(f"skipped: {why}"),
        processes=processes,
        progress=progress,
    )
    if checkpoint is None:
        return None
    if config.train.resume == "never":
        raise CheckpointError(
            f"{run_dir}: it holds checkpoints and train.resume=never. "
            "Give another paths.run_dir, or train.resume=auto to go on with this run."
        )
    refuse_other_run(checkpoint, config=config, data_fingerprint=fingerprint)
    if checkpoint.step > config.train.steps:
        raise ConfigError(
            f"train.steps: got {config.train.steps}, and the run in {run_dir} has done "
            f"{checkpoint.step} steps. Set train.steps={checkpoint.step} or more, or give another "
            "paths.run_dir to start anew."
        )
    _refuse_other_beginning(checkpoint, config)
    note = _note_on_balance(checkpoint, config, processes)
    if note:
        say(note)
    return checkpoint


def matching_tokenizer(config: TrainConfig, split: TokenSplit) -> TextTokenizer:
    """Load the data's tokenizer; refuse a model with too few rows for it, or that masks its ids."""
    manifest = split.manifest
    if manifest.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: got {config.model.vocab_size}; the data in "
            f"{config.paths.data_dir} were made by a tokenizer of {manifest.vocab_size} ids. "
            f"Set model.vocab_size={manifest.vocab_size} or more, or prepare the data again with "
            f"tokenizer.vocab_size={config.model.vocab_size}."
        )
    tokenizer = load_tokenizer(
        Path(config.paths.data_dir) / TOKENIZER_NAME, vocab_size=manifest.vocab_size
    )
    masked = [
        token
        for token in config.model.masked_tokens
        if token < tokenizer.num_pieces or token == tokenizer.end_of_text_id
    ]
    if masked:
        # one such target makes the loss infinite
        raise ConfigError(
            f"model.masked_tokens: holds {masked[0]}, which stands for text in "
            f"{config.paths.data_dir}, so it must be predicted; text has the ids below "
            f"{tokenizer.num_pieces}, and {tokenizer.end_of_text_id} ends it. "
            "Set model.masked_tokens=[] or to ids of other special tokens."
        )
    return tokenizer


def note_on_vocabulary(config: TrainConfig, manifest: Manifest) -> str:
    """What is to be said where the model has rows that these data never use."""
    rows, ids = config.model.vocab_size, manifest.vocab_size
    if rows == ids:
        return ""
    return (
        f"note: model {config.model.name} has rows for {rows:,} token ids, and the data in "
        f"{config.paths.data_dir} were made by a tokenizer of {ids:,}: the other rows learn nothing"
    )


def check_machine(config: TrainConfig, processes: Processes) -> None:
    """Raise ConfigError on all ranks where the device of one cannot do what is configured."""
    wrong = filter(None, processes.all_texts(_wrong_here(config, processes)))
    for message in wrong:
        raise ConfigError(message)


def _wrong_here(config: TrainConfig, processes: Processes) -> str:
    """Why this rank's device cannot: its experts' kernels, or no room for what stays of a step."""
    is_cuda, rank = processes.device.type == "cuda", processes.rank
    needs_cuda = config.model.is_sparse and config.experts.backend == "triton"
    if needs_cuda and not is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            f"experts.backend: got 'triton', and rank {rank} computes on a CPU; allowed there: "
            "auto, cpu, grouped_mm, reference. Use experts=auto."
        )
    world_size = processes.world_size
    layout = layout_of(config, world_size=world_size, gpus_per_node=world_size, is_cuda=is_cuda)
    state, host = state_bytes(layout)
    stays = {kind: state[kind] for kind in _STAYS if kind in state}
    if is_cuda:
        free, what = torch.cuda.get_device_properties(processes.device).total_memory, "its GPU has"
    else:
        stays |= {"offloaded optimiser": host} if host else {}
        free, what = _free_bytes(), "this machine has free"
    needed = sum(stays.values())
    if free is None or needed <= free:
        return ""
    listed = ", ".join(f"{kind} {in_words(size)}" for kind, size in stays.items())
    return (
        f"model: {config.model.name} needs {in_words(needed)} on rank {rank} before its first "
        f"step ({listed}), and {what} {in_words(free)}. Use a smaller model, or share it between "
        "more processes (parallel.zero_stage, parallel.expert_parallel_size); --dry-run says what "
        "a layout needs."
    )


def _free_bytes() -> int | None:
    """Memory that can still be had, swap not counted; None where the machine does not tell."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        told = Path("/proc/meminfo").read_text().partition("\nMemAvailable:")[2]
        found.append(int(told.split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" is none
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def check_sample_prompt(config: TrainConfig, tokenizer: TextTokenizer) -> None:
    """Raise ConfigError for a prompt that the model cannot take: training would end with it."""
    if config.train.sample_tokens == 0:
        return
    length = 1 + len(tokenizer.encode(config.train.sample_prompt))
    most = config.model.usable_length
    if length > most:
        raise ConfigError(
            f"train.sample_prompt: got a text of {length} tokens; model {config.model.name} takes "
            f"{most} at most. Shorten it, or set train.sample_tokens=0 to write no sample."
        )


def _refuse_other_beginning(checkpoint: Checkpoint, config: TrainConfig) -> None:
    saved = json.loads(checkpoint.file("config.json").read_text())
    began_with, asked = saved["train"].get("init_from"), config.train.init_from
    if asked is not None and asked != began_with:
        began = "random weights" if began_with is None else repr(began_with)
        raise ConfigError(
            f"train.init_from: got {asked!r}, and the run in {checkpoint.folder.parent.parent} is "
            f"at step {checkpoint.step} from {began}: it goes on with its own weights. Leave "
            "train.init_from out, or give another paths.run_dir to start from those weights."
        )


def _note_on_balance(checkpoint: Checkpoint, config: TrainConfig, processes: Processes) -> str:
    """What is to be said where the balance loss counts another number of tokens than before."""
    if not (config.model.is_sparse and config.router.balance_coef):
        return ""
    before = json.loads(checkpoint.file("config.json").read_text())["train"]["micro_batch_size"]
    now, over = config.train.micro_batch_size, "windows of a rank"
    if config.router.balance_scope == "global":
        before *= len(tensor_files(checkpoint.manifest, "model"))
        now, over = now * processes.world_size, "windows of all ranks"
    if before == now:
        return ""
    return (
        f"note: the balance loss counts the experts' load over {now} {over} from here on, "
        f"{before} before (train.micro_batch_size"
        + (" and the number of ranks)" if over != "windows of a rank" else ")")
    )
