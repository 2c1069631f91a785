"""A whole run: open the data, build or restore everything, train, and sum up.

`run` is what launch/train.py calls once the configuration is known to be right. What it writes
lies in config.paths.run_dir: config.json, run_id, metrics.jsonl, checkpoints/, sample.txt, wandb/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe.config import TrainConfig
from moe.data.epoch_order import stream_fingerprint
from moe.data.load_tokenizer import TextTokenizer
from moe.data.loader import Batch, training_batches
from moe.data.manifest import TOKENIZER_NAME, Manifest
from moe.data.shards import TokenSplit, open_split
from moe.data.verify import verify_data
from moe.evaluate import evaluate
from moe.generate import Sampling, generate
from moe.model.transformer import Transformer
from moe.parallel.processes import Processes, join_processes
from moe.parallel.watch import Watch, watch_over
from moe.progress_call import ProgressCall, no_progress
from moe.trace.record import ROUTING_FOLDER, TrainingRecorder, describe_training
from moe.trace.vocabulary import vocabulary_bytes
from moe.train.allocator import keep_freed_memory
from moe.train.atomic_files import replace_file
from moe.train.build import build
from moe.train.checkpoint_writer import CheckpointWriter, Saved
from moe.train.init_from import load_initial_weights
from moe.train.interrupted import telling_what_is_saved
from moe.train.loop import TrainingStopped, Yardsticks, train
from moe.train.may_start import (
    check_machine,
    check_sample_prompt,
    checkpoint_to_resume,
    matching_tokenizer,
    note_on_vocabulary,
    run_folder,
)
from moe.train.metrics import JsonlSink, Sink, Sinks
from moe.train.notice import NoticeSink, notice_of_scheduler
from moe.train.progress import ConsoleSink
from moe.train.redact import redact
from moe.train.resume import record
from moe.train.state import TrainState, restore_state, save_state
from moe.train.stop_request import STOP_SIGNALS, StopRequests
from moe.train.throughput import measure_peak_flops, model_flops_per_token
from moe.train.wandb_sink import WandbSink

# bfloat16 is used where its products are at least this much faster: below, its 8 bits buy nothing
_WORTHWHILE_SPEEDUP = 1.5
_RUN_ID_NAME = "run_id"
_MAPS_OF_A_RUN = 50  # pictures of expert load in W&B, evenly over the run

Draw = Callable[[Path], Mapping[str, Path]]  # run folder -> paths of the pictures drawn, by name


def _no_figures(run_dir: Path) -> Mapping[str, Path]:
    return {}


@dataclass(frozen=True)
class RunSummary:
    """What a finished run has to show; only rank 0 has a sample."""

    run_dir: Path
    sample: str | None
    is_first: bool


def run(
    config: TrainConfig,
    *,
    say: Callable[[str], None],
    draw: Draw = _no_figures,
    may_rename: bool = False,
) -> RunSummary:
    """Train as configured, from the newest good checkpoint of the run folder if it has one.

    say prints one line for the user; draw makes the finished run's figures, for W&B; may_rename
    says that nobody chose the run folder's name, so where it exists another is taken. Raises
    UserError for everything a user can mend.
    """
    with StopRequests() as stop:
        # the watch shall find a rank that does not come, not a collective that gives up: NCCL ends
        # the rank that waited, and that would be blamed
        patience = config.watch.stuck_seconds + 300.0
        processes = join_processes(patience_seconds=patience, device=config.parallel.device)
        if processes.device.type == "cpu":
            keep_freed_memory()
        config.check_processes(processes.world_size)
        check_machine(config, processes)
        with (
            run_folder(config.paths.run_dir, processes, may_rename=may_rename) as run_dir,
            telling_what_is_saved(run_dir),
            watch_over(processes, config.watch, run_dir=run_dir) as watch,
        ):
            paths = dataclasses.replace(config.paths, run_dir=str(run_dir))
            config = dataclasses.replace(config, paths=paths)
            speak = say if processes.is_first else lambda line: None
            return _run(config, run_dir, processes, watch, stop, say=speak, draw=draw)


def _run(
    config: TrainConfig,
    run_dir: Path,
    processes: Processes,
    watch: Watch,
    stop: StopRequests,
    *,
    say: Callable[[str], None],
    draw: Draw,
) -> RunSummary:
    data_dir = Path(config.paths.data_dir)
    if config.data.verify:
        watch.phase("verify data")
        verify_data(data_dir, ranks=processes, say=say, progress=watch.progress)
    watch.phase("open data")
    train_split = open_split(data_dir, "train", verify=False)
    validation_split = open_split(data_dir, "validation", verify=False)
    tokenizer = matching_tokenizer(config, train_split)
    check_sample_prompt(config, tokenizer)
    fingerprint = stream_fingerprint(train_split)
    watch.phase("find checkpoint")
    checkpoint = checkpoint_to_resume(
        config, run_dir, processes, fingerprint=fingerprint, say=say, progress=watch.progress
    )
    _seed_everything(config.seed)

    watch.phase("build model")
    # an upcycled model's routers are loaded from nowhere
    is_whole_parent = config.train.init_from is not None and not config.train.upcycle
    is_loaded = checkpoint is not None or is_whole_parent
    model, engine, _ = build(config, processes, is_loaded=is_loaded, progress=watch.progress)
    watch.phase("load parameters")
    if checkpoint is not None:
        state = restore_state(checkpoint, engine, config=config, data_fingerprint=fingerprint)
        say(f"resume: {checkpoint.folder}, step {state.step} of {config.train.steps}")
    else:
        if config.train.init_from is not None:
            tokenizer_sha256 = train_split.manifest.tokenizer.sha256
            load_initial_weights(
                engine,
                config,
                tokenizer_sha256=tokenizer_sha256,
                say=say,
                progress=watch.progress,
            )
        state = _new_state(config, run_dir, processes)
    precision: torch.dtype = getattr(torch, state.precision)
    yardsticks = Yardsticks(
        model_flops_per_token(config.model, config.data.seq_len),
        measure_peak_flops(processes.device, precision),
    )
    vocabulary = note_on_vocabulary(config, train_split.manifest)
    if vocabulary:
        say(vocabulary)
    _introduce(config, train_split, state, yardsticks, processes, say=say)
    resolved = redact(dataclasses.asdict(_as_prepared(config, train_split.manifest)), os.environ)
    resumed_step = state.step if checkpoint else None
    writer = CheckpointWriter(
        run_dir / "checkpoints",
        processes=processes,
        keep_last=config.train.keep_last,
        keep_every=config.train.keep_every,
        in_background=config.train.save_in_background,
        progress=watch.progress,
    )

    recorder = _recorder(config, train_split, state, tokenizer, run_dir, processes)

    def save(*, is_last: bool) -> list[Saved]:
        if recorder is not None:
            recorder.flush()  # a run that goes on from here records no step before again
        before = save_state(
            writer,
            engine,
            state,
            config=resolved,
            data_fingerprint=fingerprint,
            tokenizer_path=data_dir / TOKENIZER_NAME,
        )
        last = writer.finish() if is_last else None
        return [saved for saved in (before, last) if saved is not None]

    def evaluate_now() -> dict[str, float]:
        return evaluate(
            model,
            validation_split,
            seq_len=config.data.seq_len,
            batch_size=config.train.micro_batch_size,
            max_tokens=config.train.evaluate_tokens,
            precision=precision,
            processes=processes,
            progress=watch.progress,
        )

    batches = _batches(config, train_split, state, processes)
    with (
        _sinks(
            config,
            state,
            resolved,
            run_dir,
            resumed_step,
            processes,
            draw=draw,
            say=say,
            progress=watch.progress,
        ) as sinks,
        _profiler(config, run_dir, processes) as on_step,
        recorder or contextlib.nullcontext(),
        watch.telling(),  # a stop of all ranks is known before slow logs are closed
    ):
        try:
            with stop.until_saved():
                train(
                    config,
                    engine,
                    state,
                    batches,
                    processes=processes,
                    sinks=sinks,
                    yardsticks=yardsticks,
                    evaluate=evaluate_now,
                    save=save,
                    on_step=on_step,
                    poll=writer.poll,
                    phase=watch.phase,
                    stop_signal=lambda: stop.signal_name,
                    recorder=recorder,
                )
        except TrainingStopped:  # on every rank: a save in the background shall not be lost
            writer.finish()
            raise
        watch.phase("write sample")
        sample = write_sample(config, model, tokenizer, processes, progress=watch.progress)
        watch.phase("finishing")
    if not processes.is_first:
        return RunSummary(run_dir, None, False)
    replace_file(run_dir / "sample.txt", sample.encode())
    return RunSummary(run_dir, sample, True)


def _recorder(
    config: TrainConfig,
    split: TokenSplit,
    state: TrainState,
    tokenizer: TextTokenizer,
    run_dir: Path,
    processes: Processes,
) -> TrainingRecorder | None:
    """What records the routing of every train.trace_every-th step, if that is wanted."""
    if not config.train.trace_every:
        return None
    return TrainingRecorder(
        run_dir / ROUTING_FOLDER,
        describe_training(
            config, split.manifest, run_id=state.run_id, logits=config.train.trace_logits
        ),
        processes=processes,
        resume_step=state.step,
        vocabulary=vocabulary_bytes(tokenizer),
    )


def _as_prepared(config: TrainConfig, manifest: Manifest) -> TrainConfig:
    """The configuration with the text and vocabulary that were prepared, for the run's record.

    A run is told where its data lie, by data.name or paths.data_dir; what is in them was decided
    when they were prepared, and the record of a run must not say otherwise.
    """
    settings = json.loads(manifest.settings)
    data = dataclasses.replace(
        config.data,
        sources=manifest.sources,
        text_key=settings.get("data.text_key", "text"),
        max_bad_lines=settings.get("data.max_bad_lines", 0),
        max_bytes=settings["data.max_bytes"],
        validation_fraction=settings["data.validation_fraction"],
    )
    tokenizer = dataclasses.replace(config.tokenizer, vocab_size=manifest.vocab_size)
    return dataclasses.replace(config, data=data, tokenizer=tokenizer)


def _seed_everything(seed: int) -> None:
    """Seed the global generators; routing and data do not use them, libraries may."""
    import random

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _new_state(config: TrainConfig, run_dir: Path, processes: Processes) -> TrainState:
    precision = config.train.precision
    if config.parallel.bf16_parameters:
        precision = "bfloat16"
    elif precision == "auto":
        slow = measure_peak_flops(processes.device, torch.float32, seconds=0.3)
        fast = measure_peak_flops(processes.device, torch.bfloat16, seconds=0.3)
        precision = "bfloat16" if fast > _WORTHWHILE_SPEEDUP * slow else "float32"
    return TrainState(
        run_id=processes.from_first(_run_id(run_dir)),
        precision=processes.from_first(precision),
    )


def _run_id(run_dir: Path) -> str:
    """Return the folder's id, or a new one: a run killed before its first save stays one run."""
    path = run_dir / _RUN_ID_NAME
    known = path.read_text() if path.is_file() else ""
    return known if re.fullmatch("[0-9a-f]{8}", known) else secrets.token_hex(4)


def _introduce(
    config: TrainConfig,
    split: TokenSplit,
    state: TrainState,
    yardsticks: Yardsticks,
    processes: Processes,
    *,
    say: Callable[[str], None],
) -> None:
    """Say what is about to run, in four lines."""
    model, loop = config.model, config.train
    total, active = model.num_parameters(), model.num_parameters(active=True)
    kind = f"{model.num_experts} experts top-{model.top_k}" if model.is_sparse else "dense"
    router = f", {config.router.name}" if model.is_sparse else ""
    say(f"model: {model.name}, {total:,} parameters, {active:,} active, {kind}{router}")
    tokens = loop.steps * loop.batch_size * config.data.seq_len
    say(
        f"data: {config.paths.data_dir}, {split.num_tokens:,} tokens of "
        f"{', '.join(split.domains)}; this run reads {tokens:,}"
    )
    parallel = config.parallel
    layout = f", ZeRO {parallel.zero_stage}" if parallel.zero_stage else ""
    if parallel.expert_parallel_size > 1:
        layout += f", experts over {parallel.expert_parallel_size}"
    say(
        f"engine: {parallel.engine}{layout}, {processes.world_size} process(es) on "
        f"{processes.device.type}, {state.precision}, "
        f"peak {yardsticks.peak_flops / 1e9:,.0f} GFLOP/s"
    )
    say(f"run folder: {config.paths.run_dir}")


def _sinks(
    config: TrainConfig,
    state: TrainState,
    resolved: dict[str, Any],
    run_dir: Path,
    resumed_step: int | None,
    processes: Processes,
    *,
    draw: Draw,
    say: Callable[[str], None],
    progress: ProgressCall,
) -> Sinks:
    if not processes.is_first:
        return Sinks([])
    run_dir.mkdir(parents=True, exist_ok=True)
    record(run_dir, resolved, step=resumed_step, say=say)
    replace_file(run_dir / _RUN_ID_NAME, state.run_id.encode())
    sinks: list[Sink] = [
        JsonlSink(run_dir / "metrics.jsonl", resume_step=resumed_step or 0),
        ConsoleSink(config.train.steps, stream=sys.stdout, first_step=state.step),
    ]
    if notice_of_scheduler():
        sinks.append(NoticeSink(notice_of_scheduler()))
    if config.logging.wandb != "disabled":
        sinks.append(
            WandbSink(
                config.logging,
                run_dir=run_dir,
                run_id=state.run_id,
                run_name=_shown_name(config),
                resolved_config=resolved,
                resumed_step=resumed_step,
                heat_map_every=max(10, config.train.steps // _MAPS_OF_A_RUN),
                final_step=config.train.steps,
                figures=functools.partial(draw, run_dir),
                trace_folder=run_dir / ROUTING_FOLDER if config.train.trace_every else None,
                progress=progress,
            )
        )
    return Sinks(sinks)


def _shown_name(config: TrainConfig) -> str:
    """The name in W&B's list of runs, which tells the arms and seeds of a group apart."""
    arm = "" if config.logging.job_type == "train" else f" {config.logging.job_type}"
    return f"{config.name}{arm} seed {config.seed}"


@contextlib.contextmanager
def _profiler(
    config: TrainConfig, run_dir: Path, processes: Processes
) -> Iterator[Callable[[], None]]:
    """Yield what to call after each step; with train.profile, steps 3 to 5 are traced."""
    if not (config.train.profile and processes.is_first):
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(run_dir / "trace.json"))

    with profile(schedule=schedule(wait=2, warmup=0, active=3), on_trace_ready=write) as profiler:
        yield profiler.step


def _batches(
    config: TrainConfig, split: TokenSplit, state: TrainState, processes: Processes
) -> Iterator[list[Batch]]:
    """The micro-batches of every step left; with train.overfit, those of step 0 each time."""
    num_left = config.train.steps - state.step
    batches = training_batches(
        split,
        seed=config.seed,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        start_step=0 if config.train.overfit else state.step,
        num_steps=num_left,
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=config.data.num_workers,
        blocked_signals=(*STOP_SIGNALS, signal.SIGINT),
    )
    return _repeat_first(batches, times=num_left) if config.train.overfit else batches


def _repeat_first(batches: Iterator[list[Batch]], *, times: int) -> Iterator[list[Batch]]:
    first = next(batches, None)
    for _ in range(times if first is not None else 0):
        yield first  # type: ignore[misc]


def write_sample(
    config: TrainConfig,
    model: Transformer,
    tokenizer: TextTokenizer,
    processes: Processes,
    *,
    progress: ProgressCall = no_progress,
) -> str:
    """Continue train.sample_prompt; the prompt is part of the text returned.

    All ranks write the same text together: experts or parameters may be spread over them.
    """
    if config.train.sample_tokens == 0:
        return ""
    was_training = model.training
    model.eval()
    prompt = [tokenizer.bos_id, *tokenizer.encode(config.train.sample_prompt)]
    room = config.model.usable_length - len(prompt)
    sampling = Sampling(
        max_new_tokens=max(1, min(config.train.sample_tokens, room)),
        temperature=config.train.sample_temperature,
        top_p=0.95,
        seed=config.seed,
    )
    agree = processes.tensor_from_first
    new = []
    for token in generate(model, prompt, sampling, stop_ids=tokenizer.stop_ids, agree=agree):
        new.append(token)
        progress(1)
    model.train(was_training)
    text = tokenizer.decode([*prompt[1:], *new])
    # the sample is a file of the run folder: a prompt that holds a secret is not repeated in it
    shown = redact({"sample_prompt": config.train.sample_prompt}, os.environ)["sample_prompt"]
    return shown + text.removeprefix(config.train.sample_prompt)
