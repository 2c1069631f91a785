"""The training loop, a straight line: accumulate, step, log, evaluate, save."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from moe.config import TrainConfig
from moe.data.packing import IGNORED, Batch
from moe.errors import UserError
from moe.parallel.engine import Engine
from moe.parallel.processes import Processes
from moe.sparse.router import Routing
from moe.trace.record import TrainingRecorder
from moe.train.checkpoint_writer import Saved
from moe.train.metrics import Record, Sinks
from moe.train.optim import learning_rate
from moe.train.state import TrainState
from moe.train.step import LossTerms, loss_terms, rows_hash
from moe.train.throughput import Clock, memory_in_use_gib, mfu


class TrainingStopped(UserError):
    """Training cannot go on by itself; the last good checkpoint is untouched."""

    exit_code = 3


class Preempted(UserError):
    """Stopped by a signal, after a save: the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL


class Interrupted(Preempted):
    """Stopped by Ctrl-C, after a save: no scheduler starts it again."""

    exit_code = 130


@dataclass(frozen=True)
class Yardsticks:
    """What tokens per second are measured against."""

    flops_per_token: float
    peak_flops: float  # of one device, measured at the start


@dataclass(frozen=True)
class StepResult:
    """One optimiser step, over all ranks; routing numbers are empty for a dense model."""

    loss: float  # nats a label
    balance: float
    z: float
    total: float
    grad_norm: float
    num_labels: int
    data_hash: str  # of the step's rows, the same for every layout: two runs saw the same data
    is_skipped: bool
    is_stop_asked: bool  # a rank had been asked to stop before this step
    load_LE: list[list[float]]  # fraction of a layer's routed rows
    entropy_L: list[float]
    trace_seconds: float | None  # that this rank waited for its routing to be recorded, if it was


class Phase(Protocol):
    """Is told what this rank does from now on, and in which step; see moe.parallel.watch."""

    def __call__(self, name: str, step: int | None = None) -> None: ...


def _ignore_phase(name: str, step: int | None = None) -> None: ...


class SaveNow(Protocol):
    """Saves a checkpoint of this moment; is_last waits until it is whole.

    Returns the saves that became whole meanwhile: in the background that is one before, if any.
    """

    def __call__(self, *, is_last: bool) -> list[Saved]: ...


def train(
    config: TrainConfig,
    engine: Engine,
    state: TrainState,
    batches: Iterator[list[Batch]],
    *,
    processes: Processes,
    sinks: Sinks,
    yardsticks: Yardsticks,
    evaluate: Callable[[], dict[str, float]],
    save: SaveNow,
    on_step: Callable[[], None],
    poll: Callable[[], Saved | None] = lambda: None,
    phase: Phase = _ignore_phase,
    stop_signal: Callable[[], str | None] = lambda: None,
    recorder: TrainingRecorder | None = None,
) -> None:
    """Train from state.step to config.train.steps; batches yields each step's micro-batches.

    A step whose loss or gradient norm is not finite is never applied: it is counted, its data are
    passed over, and after train.max_skips in a row the run stops (TrainingStopped). Where any rank
    has received a stop signal, all save after the step and stop (Preempted). poll is asked after
    every step whether a save has become whole; phase is told what this rank begins to do.
    """
    clock, loop = Clock(), config.train
    for micro_batches in batches:
        lr = learning_rate(state.step, config=config.optim, num_steps=loop.steps)
        signal_name = stop_signal()
        is_traced = recorder is not None and (state.step + 1) % loop.trace_every == 0
        result = train_step(
            config, engine, micro_batches, lr=lr, state=state, processes=processes, phase=phase,
            is_stop_asked=signal_name is not None, recorder=recorder if is_traced else None,
        )  # fmt: skip
        state.step += 1
        clock.count(result.num_labels)
        on_step()
        if _due(loop.log_every, state.step, loop.steps) or result.is_skipped or is_traced:
            speed = clock.read()
            record = {"kind": "train", "step": state.step, "loss": result.loss}
            record |= {"loss/total": result.total, "loss/balance": result.balance}
            record |= {"loss/z": result.z, "lr": lr, "grad_norm": result.grad_norm}
            record |= {"tokens_seen": state.tokens_seen, "skipped": result.is_skipped}
            record |= {"data_hash": result.data_hash}
            record |= {"tokens_per_second": speed.tokens_per_second}
            record |= {"step_seconds": speed.step_seconds, "memory_gib": memory_in_use_gib()}
            record |= {"mfu": _mfu(speed.tokens_per_second, yardsticks, processes)}
            sinks.write(state.step, record | _routing_record(result))
        _stop_if_hopeless(state, max_skips=loop.max_skips)
        _log_saves([poll()], state, sinks)
        is_last = state.step == loop.steps or result.is_stop_asked
        with clock.paused():
            is_saved = is_last or _due(loop.save_every, state.step, loop.steps)
            if _due(loop.evaluate_every, state.step, loop.steps):
                phase("evaluate")
                validation = evaluate()
                sinks.write(state.step, {"kind": "validation", "step": state.step} | validation)
                if is_saved and loop.keep_best:
                    state.note_validation(validation["validation/loss"])
            if is_saved:
                phase("save")
                _log_saves(save(is_last=is_last), state, sinks)
        if result.is_stop_asked and state.step < loop.steps:
            stopped = Interrupted if signal_name == "SIGINT" else Preempted
            raise stopped(
                f"stopped by {signal_name or 'a signal to another rank'} after step {state.step} "
                f"of {loop.steps}, which is saved. The same command with the same paths.run_dir "
                "goes on from there."
            )
        phase("load data", state.step)


def _log_saves(saves: Iterable[Saved | None], state: TrainState, sinks: Sinks) -> None:
    for saved in filter(None, saves):
        record = {"kind": "checkpoint", "step": state.step, "checkpoint/step": saved.step}
        record |= {"checkpoint/stall_seconds": saved.stall_seconds}
        record |= {"checkpoint/waited_seconds": saved.waited_seconds}
        record |= {"checkpoint/write_seconds": saved.write_seconds}
        sinks.write(state.step, record | {"checkpoint/bytes": saved.num_bytes})


def train_step(
    config: TrainConfig,
    engine: Engine,
    micro_batches: list[Batch],
    *,
    lr: float,
    state: TrainState,
    processes: Processes,
    phase: Phase = _ignore_phase,
    is_stop_asked: bool = False,
    recorder: TrainingRecorder | None = None,
) -> StepResult:
    """One optimiser step over all ranks; updates the counters of state, not its step."""
    engine.model.train()
    phase("count labels", state.step + 1)
    num_labels, hash_sum, num_asked = _agree_on_rows(micro_batches, processes, is_stop_asked)
    terms, trace_seconds = [], 0.0

    def record(batch: Batch, routings: tuple[Routing, ...]) -> None:
        nonlocal trace_seconds
        assert recorder is not None
        trace_seconds += recorder.record(state.step + 1, batch, routings)

    for index, batch in enumerate(micro_batches, start=1):
        phase("forward")
        term = loss_terms(
            engine.forward,
            batch.to(processes.device),
            router=config.router,
            seed=config.seed,
            num_labels=num_labels,
            num_ranks=processes.world_size,
            num_micro=len(micro_batches),
            precision=getattr(torch, state.precision),
            reduce=processes.sum,
            on_routing=None if recorder is None else functools.partial(record, batch),
        )
        phase("backward")
        engine.backward(term.total, is_last=index == len(micro_batches))
        terms.append(term)
    if recorder is not None:
        trace_seconds += recorder.end_step()
    phase("sum losses")
    loss, balance, z, load_LE, entropy_L = _over_ranks(terms, num_labels, processes)
    phase("update")
    if math.isfinite(loss):
        grad_norm = engine.step(lr=lr)
    else:
        engine.discard()
        grad_norm = math.nan
    is_skipped = not math.isfinite(grad_norm)
    if is_skipped:
        state.skipped_steps.append(state.step)
        state.consecutive_skips += 1
    else:
        state.consecutive_skips = 0
        state.tokens_seen += int(num_labels)
    total = loss + config.router.balance_coef * balance + config.router.z_coef * z
    return StepResult(
        loss=loss,
        balance=balance,
        z=z,
        total=total,
        grad_norm=grad_norm,
        num_labels=int(num_labels),
        data_hash=f"{int(hash_sum) % 2**32:08x}",
        is_skipped=is_skipped,
        is_stop_asked=bool(num_asked),
        load_LE=load_LE,
        entropy_L=entropy_L,
        trace_seconds=None if recorder is None else trace_seconds,
    )


def _agree_on_rows(
    micro_batches: list[Batch], processes: Processes, is_stop_asked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the step's labels (float32), its sum of row hashes, and how many ranks shall stop."""
    labels = sum(int((batch.labels != IGNORED).sum()) for batch in micro_batches)
    hashes = sum(rows_hash(batch) for batch in micro_batches)
    totals = processes.sum(torch.tensor([labels, hashes, is_stop_asked], device=processes.device))
    return totals[0].float(), totals[1], totals[2]


def _over_ranks(
    terms: list[LossTerms], num_labels: torch.Tensor, processes: Processes
) -> tuple[float, float, float, list[list[float]], list[float]]:
    """Reduce the step's numbers over micro-batches and ranks in one exchange."""
    share = 1.0 / (len(terms) * processes.world_size)
    load_LE = torch.stack([t.load_LE for t in terms]).sum(dim=0)
    entropy_L = torch.stack([t.entropy_L for t in terms]).sum(dim=0) * share
    scalars = torch.stack(
        [
            torch.stack([t.cross_entropy_sum for t in terms]).sum() / num_labels.clamp(min=1),
            torch.stack([t.balance for t in terms]).sum() * share,
            torch.stack([t.z for t in terms]).sum() * share,
        ]
    )
    flat = processes.sum(torch.cat([scalars, entropy_L, load_LE.flatten()])).cpu()
    # syncs: the numbers are logged, and the loss decides whether the step is applied
    num_layers = entropy_L.numel()
    load_LE = flat[3 + num_layers :].view(load_LE.shape)
    load_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1)
    loss, balance, z = flat[:3].tolist()
    return loss, balance, z, load_LE.tolist(), flat[3 : 3 + num_layers].tolist()


def _routing_record(result: StepResult) -> Record:
    if not result.load_LE:
        return {}
    traced = {} if result.trace_seconds is None else {"trace/seconds": result.trace_seconds}
    dead = sum(share == 0 for layer in result.load_LE for share in layer)
    return {
        "router/load_LE": [[round(share, 6) for share in layer] for layer in result.load_LE],
        "router/entropy_L": result.entropy_L,
        "router/dead_experts": dead,
    } | traced


def _mfu(tokens_per_second: float, yardsticks: Yardsticks, processes: Processes) -> float:
    return mfu(
        tokens_per_second / processes.world_size,
        yardsticks.flops_per_token,
        yardsticks.peak_flops,
    )


def _due(every: int, step: int, num_steps: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _stop_if_hopeless(state: TrainState, *, max_skips: int) -> None:
    if state.consecutive_skips >= max_skips:
        raise TrainingStopped(
            f"training stopped at step {state.step}: the last {max_skips} steps had a loss or "
            f"gradient that is not finite (steps {state.skipped_steps[-max_skips:]}), and none was "
            "applied. The last checkpoint is good. Lower optim.lr, raise optim.warmup_steps, or "
            "look at those batches; train.max_skips sets how many are passed over."
        )
