"""The loop's decisions: what is applied, counted, recorded, saved, and when training stops."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    TrainConfig,
)  # fmt: skip
from moe.data.loader import training_batches
from moe.data.shards import open_split
from moe.model.transformer import Output, build_model
from moe.parallel.engine import Engine, make_engine
from moe.parallel.processes import Processes
from moe.train.checkpoint import find_checkpoint
from moe.train.checkpoint_writer import CheckpointWriter, Saved
from moe.train.loop import Preempted, TrainingStopped, Yardsticks, train
from moe.train.metrics import Record, Sinks
from moe.train.state import TrainState, restore_state, save_state

REPOSITORY = Path(__file__).parents[3]
ALONE = Processes(0, 1, torch.device("cpu"))
MEASURED = {
    "tokens_per_second", "step_seconds", "memory_gib", "mfu", "checkpoint/stall_seconds",
    "checkpoint/waited_seconds", "checkpoint/write_seconds",
}  # fmt: skip
CONFIG = TrainConfig(
    seed=5,
    model=ModelConfig(
        name="nano", vocab_size=512, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=8, intermediate_size=8, num_experts=4, top_k=2,
    ),
    router=RouterConfig(z_coef=0.001),
    data=DataConfig(seq_len=32),
    optim=OptimConfig(warmup_steps=2, grad_clip=0.5),
    parallel=ParallelConfig(engine="plain"),
    train=LoopConfig(
        steps=8, batch_size=4, micro_batch_size=2, evaluate_every=4, save_every=2, keep_last=9,
        max_skips=3, precision="float32",
    ),
)  # fmt: skip


class PoisonedEngine:
    """The real engine, with one value of a gradient or of the logits spoiled at chosen steps."""

    def __init__(self, engine: Engine, poison: Mapping[int, str], *, step: int) -> None:
        self._engine, self._poison, self._step = engine, poison, step
        self.model, self.optimizer = engine.model, engine.optimizer

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> object:
        output = self._engine.forward(*inputs, **named)
        assert isinstance(output, Output)
        kind, value = self._poison.get(self._step, "none 0").split()
        if kind != "loss":
            return output
        spoil = torch.zeros_like(output.logits)
        if value == "inf":
            spoil[0, 0, 1:] = -math.inf  # the label's probability is 0, the gradient stays finite
        else:
            spoil[0, 0, 0] = float(value)
        return output._replace(logits=output.logits + spoil)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self._engine.backward(loss, is_last=is_last)
        kind, value = self._poison.get(self._step, "none 0").split()
        if kind == "gradient" and is_last:
            gradient = self.model.get_parameter("blocks.0.feed_forward.router.weight").grad
            assert gradient is not None
            gradient[1, 2] = float(value)

    def step(self, *, lr: float) -> float:
        self._step += 1
        return self._engine.step(lr=lr)

    def discard(self) -> None:
        self._step += 1
        self._engine.discard()


class ListSink:
    """Keeps what it is given."""

    may_fail = False

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, step: int, record: Record) -> None:
        assert step == record["step"]
        self.records.append({k: v for k, v in record.items() if k not in MEASURED})

    def close(self) -> None: ...


@dataclass(frozen=True)
class Trained:
    """What a run left behind."""

    model: nn.Module
    state: TrainState
    optimizer: torch.optim.Optimizer
    records: list[Record]
    stopped: TrainingStopped | Preempted | None

    def of_kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record["kind"] == kind]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, and the optimiser's tensors of each."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter.detach().clone()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name}.{key}"] = value.clone()
        return found


def run(
    data_dir: Path,
    folder: Path,
    config: TrainConfig = CONFIG,
    *,
    poison: Mapping[int, str] | None = None,
    interrupt_after: int | None = None,
    signal_in: int | None = None,
    watch: Callable[[TrainState, Engine], None] | None = None,
) -> Trained:
    """Train with real parts, from the newest checkpoint of folder if it has one."""
    split = open_split(data_dir, "train", verify=False)
    model = build_model(config.model, config.router, config.experts, seed=config.seed)
    engine = make_engine(model, config.optim, config.parallel, ALONE)
    checkpoint = find_checkpoint(folder, on_skip=pytest.fail)
    fingerprint, sink = split.manifest.fingerprint, ListSink()
    if checkpoint is None:
        state = TrainState(run_id="0", precision="float32")
    else:
        state = restore_state(checkpoint, engine, config=config, data_fingerprint=fingerprint)
    poisoned = PoisonedEngine(engine, poison or {}, step=state.step)

    writer = CheckpointWriter(
        folder, processes=ALONE, keep_last=config.train.keep_last, in_background=False
    )

    def save(*, is_last: bool) -> list[Saved]:
        saved = save_state(
            writer, engine, state, config=asdict(config), data_fingerprint=fingerprint,
            tokenizer_path=data_dir / "tokenizer.model",
        )  # fmt: skip
        if interrupt_after == state.step:
            raise KeyboardInterrupt
        assert saved is not None  # in the foreground
        return [saved]

    batches = training_batches(
        split, seed=config.seed, seq_len=config.data.seq_len, batch_size=config.train.batch_size,
        micro_batch_size=config.train.micro_batch_size, start_step=state.step,
        num_steps=config.train.steps - state.step, rank=0, world_size=1, num_workers=0,
    )  # fmt: skip
    stopped = None
    try:
        train(
            config, poisoned, state, batches, processes=ALONE, sinks=Sinks([sink]),
            yardsticks=Yardsticks(1.0, 1.0), evaluate=lambda: {"validation/loss": 1.0},
            save=save, on_step=lambda: watch(state, engine) if watch else None,
            stop_signal=lambda: "SIGTERM" if signal_in == state.step else None,
        )  # fmt: skip
    except (TrainingStopped, Preempted) as error:
        stopped = error
    except KeyboardInterrupt:
        assert interrupt_after is not None
    return Trained(model, state, engine.optimizer, sink.records, stopped)


def assert_same_bits(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.numpy().tobytes() == other[name].numpy().tobytes(), name


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().numpy().tobytes()
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = value.numpy().tobytes()
    return found


@pytest.mark.parametrize("kind", ["gradient nan", "gradient inf", "gradient -inf"])
def test_a_gradient_that_is_not_finite_is_counted_and_never_applied(
    kind: str, short_documents: Path, tmp_path: Path
) -> None:
    check_that_step_3_is_skipped(kind, short_documents, tmp_path)


@pytest.mark.parametrize("kind", ["loss nan", "loss inf"])
def test_a_loss_that_is_not_finite_is_counted_and_never_applied(
    kind: str, short_documents: Path, tmp_path: Path
) -> None:
    record = check_that_step_3_is_skipped(kind, short_documents, tmp_path)
    assert not math.isfinite(record["loss"])


def check_that_step_3_is_skipped(kind: str, data_dir: Path, tmp_path: Path) -> Record:
    """Spoil the third step; return its record."""
    seen: dict[int, dict[str, bytes]] = {}

    def watch(state: TrainState, engine: Engine) -> None:
        seen[state.step] = bits(engine.model, engine.optimizer)
        assert all(p.grad is None for p in engine.model.parameters())  # nothing leaks on

    done = run(data_dir, tmp_path, poison={2: kind}, watch=watch)
    assert seen[3] == seen[2]  # parameters, both moments and their step counts, to the bit
    assert seen[2] != seen[1]
    assert seen[4] != seen[3]  # training went on
    assert (done.state.skipped_steps, done.state.consecutive_skips) == ([2], 0)
    records = done.of_kind("train")
    assert [r["skipped"] for r in records] == [False, False, True, *[False] * 5]
    assert records[2]["tokens_seen"] == records[1]["tokens_seen"]
    assert not math.isfinite(records[2]["grad_norm"])
    clean = run(data_dir, tmp_path / "clean").of_kind("train")
    # its data are passed over, and the schedule goes on
    for key in ("step", "data_hash", "lr"):
        assert [r[key] for r in records] == [r[key] for r in clean]
    return records[2]


def test_skips_before_and_after_a_resume_end_as_without_it(
    short_documents: Path, tmp_path: Path
) -> None:
    poison = {0: "loss nan", 3: "gradient nan", 4: "loss inf", 7: "gradient inf"}
    whole = run(short_documents, tmp_path / "whole", poison=poison)
    first = run(short_documents, tmp_path / "parts", poison=poison, interrupt_after=4)
    assert first.state.consecutive_skips == 1  # the resume is in the middle of two skips in a row
    second = run(short_documents, tmp_path / "parts", poison=poison)
    assert whole.state == second.state
    assert whole.state.skipped_steps == [0, 3, 4, 7]
    in_parts = [r for r in first.records + second.records if r["kind"] != "checkpoint"]
    assert repr([r for r in whole.records if r["kind"] != "checkpoint"]) == repr(in_parts)  # nan
    assert_same_bits(whole.tensors(), second.tensors())


def test_training_stops_after_too_many_skips_in_a_row_and_leaves_a_good_checkpoint(
    short_documents: Path, tmp_path: Path
) -> None:
    poison = {1: "gradient nan", 3: "gradient nan", 4: "loss nan", 5: "gradient nan"}
    done = run(short_documents, tmp_path, poison=poison)
    assert done.stopped is not None
    assert done.stopped.exit_code == 3
    for words in ("step 6", "last 3 steps", "[3, 4, 5]", "optim.lr", "train.max_skips"):
        assert words in str(done.stopped)
    assert [r["skipped"] for r in done.of_kind("train")] == [False, True, False, True, True, True]
    checkpoint = find_checkpoint(tmp_path, on_skip=pytest.fail)
    assert checkpoint is not None
    assert checkpoint.step == 4  # the hopeless step is not saved
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors("model").values())


def test_a_resumed_run_stops_at_the_same_step_and_goes_on_when_the_cause_is_gone(
    short_documents: Path, tmp_path: Path
) -> None:
    poison = {3: "gradient nan", 4: "loss nan", 5: "gradient nan"}
    first = run(short_documents, tmp_path, poison=poison)
    again = run(short_documents, tmp_path, poison=poison)  # from step 4, after one of the skips
    assert again.state.step == 6
    assert str(again.stopped) == str(first.stopped)
    mended = run(short_documents, tmp_path)
    assert mended.stopped is None
    assert (mended.state.step, mended.state.skipped_steps) == (8, [3])


def test_skips_that_are_not_in_a_row_never_stop_training(
    short_documents: Path, tmp_path: Path
) -> None:
    poison: dict[int, str] = dict.fromkeys([0, 1, 3, 4, 6, 7], "gradient nan")
    done = run(short_documents, tmp_path, poison=poison)
    assert done.stopped is None
    assert done.state.skipped_steps == [0, 1, 3, 4, 6, 7]


def test_a_stop_signal_saves_after_the_step_and_the_next_run_goes_on_as_if_nothing_had_been(
    short_documents: Path, tmp_path: Path
) -> None:
    whole = run(short_documents, tmp_path / "whole")
    first = run(short_documents, tmp_path / "parts", signal_in=2)  # no save is due at 3
    assert isinstance(first.stopped, Preempted)
    assert first.stopped.exit_code == 75
    for words in ("SIGTERM", "step 3 of 8", "goes on"):
        assert words in str(first.stopped)
    assert (tmp_path / "parts/latest").read_text() == "step_00000003\n"
    second = run(short_documents, tmp_path / "parts")
    assert second.stopped is None
    steps = [r["step"] for part in (first, second) for r in part.of_kind("train")]
    assert steps == list(range(1, 9))
    assert_same_bits(whole.tensors(), second.tensors())


def test_a_signal_in_the_last_step_ends_the_run_as_any_other(
    short_documents: Path, tmp_path: Path
) -> None:
    assert run(short_documents, tmp_path, signal_in=7).stopped is None


def test_every_save_is_recorded_with_what_it_cost(short_documents: Path, tmp_path: Path) -> None:
    records = run(short_documents, tmp_path).of_kind("checkpoint")
    assert [r["checkpoint/step"] for r in records] == [2, 4, 6, 8]
    for record in records:
        folder = tmp_path / f"step_{record['checkpoint/step']:08d}"
        files = sum(p.stat().st_size for p in folder.iterdir() if p.name != "manifest.json")
        assert record["checkpoint/bytes"] == files


def with_loop(**changes: Any) -> TrainConfig:
    return replace(CONFIG, train=replace(CONFIG.train, **changes))


def test_records_evaluations_and_saves_come_when_due_and_at_the_end(
    short_documents: Path, tmp_path: Path
) -> None:
    config = with_loop(steps=7, log_every=3, evaluate_every=2, save_every=4)
    done = run(short_documents, tmp_path, config, poison={4: "loss nan"})
    assert [r["step"] for r in done.of_kind("train")] == [3, 5, 6, 7]  # a skipped step always
    assert [r["step"] for r in done.of_kind("validation")] == [2, 4, 6, 7]
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000004", "step_00000007"]


def test_zero_means_only_at_the_end(short_documents: Path, tmp_path: Path) -> None:
    done = run(short_documents, tmp_path, with_loop(evaluate_every=0, save_every=0))
    assert [r["step"] for r in done.of_kind("validation")] == [8]
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000008"]


def test_a_record_holds_the_numbers_of_its_step(short_documents: Path, tmp_path: Path) -> None:
    done = run(short_documents, tmp_path)
    for record in done.of_kind("train"):
        balance, z = record["loss/balance"], record["loss/z"]
        total = record["loss"] + 0.01 * balance + 0.001 * z
        assert record["loss/total"] == pytest.approx(total)
        assert [sum(layer) for layer in record["router/load_LE"]] == pytest.approx([1], abs=1e-5)
        dead = sum(share == 0 for layer in record["router/load_LE"] for share in layer)
        assert record["router/dead_experts"] == dead
        assert 0 < record["router/entropy_L"][0] <= math.log(4) + 1e-6
    # labels, not tokens: the last token of a document has none
    assert done.state.tokens_seen == done.of_kind("train")[-1]["tokens_seen"] < 8 * 4 * 32


def test_a_finished_run_that_is_started_again_trains_no_step(
    short_documents: Path, tmp_path: Path
) -> None:
    first = run(short_documents, tmp_path)
    again = run(short_documents, tmp_path)
    assert again.records == []
    assert again.state == first.state
    assert_same_bits(again.tensors(), first.tensors())


@pytest.mark.slow
def test_the_command_exits_with_3_and_one_message_when_training_diverges(
    short_documents: Path, tmp_path: Path
) -> None:
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")])
    done = subprocess.run(
        [
            sys.executable, str(REPOSITORY / "launch/train.py"), "experiment=nano",
            f"paths.data_dir={short_documents}", "paths.run_dir=diverged", "train.steps=9",
            "train.save_every=1", "train.max_skips=2", "optim.lr=1e30", "optim.warmup_steps=0",
            "train.precision=float32",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: training stopped at step 3: the last 2 steps" in done.stderr
    checkpoint = find_checkpoint(tmp_path / "diverged/checkpoints", on_skip=pytest.fail)
    assert checkpoint is not None
    assert checkpoint.state["train"]["skipped_steps"] == [1]
