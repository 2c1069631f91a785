"""Recording in training: the counts of the log, token for token; resumed; over two ranks."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moe.config import (
    DataConfig,
    LoopConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    TrainConfig,
)
from moe.data.loader import training_batches
from moe.data.packing import Batch
from moe.data.shards import TokenSplit, open_split
from moe.errors import DataError
from moe.model.transformer import Output, build_model
from moe.model_config import ModelConfig
from moe.parallel.engine import make_engine
from moe.parallel.processes import Processes
from moe.trace import record as record_module
from moe.trace.batch import join_rows
from moe.trace.info import TraceInfo, rank_name, write_info
from moe.trace.read import Trace, open_trace
from moe.trace.record import TrainingRecorder, describe_training
from moe.trace.replay import replay_batches
from moe.train.loop import StepResult, train_step
from moe.train.state import TrainState

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
CONFIG = TrainConfig(
    seed=5,
    model=ModelConfig(
        name="nano", vocab_size=512, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=8, intermediate_size=8, num_experts=4, top_k=2,
    ),
    router=RouterConfig(mask_threshold=0.3),
    data=DataConfig(seq_len=32),
    optim=OptimConfig(warmup_steps=2),
    parallel=ParallelConfig(engine="plain"),
    train=LoopConfig(steps=8, batch_size=8, micro_batch_size=2, precision="float32"),
)  # fmt: skip


class ListeningEngine:
    """The real engine; what each forward pass returned is handed to `heard`."""

    def __init__(self, engine, heard: Callable[[Output], None]) -> None:
        self._engine, self._heard, self.model = engine, heard, engine.model
        self.backward, self.step, self.discard = engine.backward, engine.step, engine.discard

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> object:
        output = self._engine.forward(*inputs, **named)
        self._heard(output)
        return output


@pytest.fixture(scope="module")
def text(short_documents: Path) -> TokenSplit:
    return open_split(short_documents, "train", verify=True)


def info_of(split: TokenSplit, *, run_id: str = "abcd1234", logits: bool = True) -> TraceInfo:
    return describe_training(CONFIG, split.manifest, run_id=run_id, logits=logits)


def with_padding(batch: Batch, num_padded: int) -> Batch:
    """The same rows, the last places of each as the end of a stream would leave them."""
    changed = {name: getattr(batch, name).clone() for name in ("labels", "document", "domain")}
    changed["labels"][:, -num_padded:] = -100
    changed["document"][:, -num_padded:] = -1
    changed["domain"][:, -num_padded:] = -1
    return dataclasses.replace(batch, **changed)


def train_recorded(
    folder: Path,
    split: TokenSplit,
    *,
    steps: range,
    resume_step: int = 0,
    processes: Processes = ALONE,
    world_size: int = 1,
    vocabulary: bytes | None = None,
) -> dict[int, StepResult]:
    """Run these steps of the real loop, record each, and return what the log is made of."""
    results, state = {}, TrainState(run_id="abcd1234", precision="float32")
    model = build_model(CONFIG.model, CONFIG.router, seed=3)
    outputs: list[Output] = []
    engine = ListeningEngine(
        make_engine(model, CONFIG.optim, CONFIG.parallel, ALONE), outputs.append
    )
    batches = training_batches(
        split, seed=5, seq_len=32, batch_size=8, micro_batch_size=2, start_step=steps.start,
        num_steps=len(steps), rank=processes.rank, world_size=world_size, num_workers=0,
    )  # fmt: skip
    with TrainingRecorder(
        folder, info_of(split), processes=processes, resume_step=resume_step, vocabulary=vocabulary
    ) as recorder:
        for step, micro_batches in zip(steps, batches, strict=True):
            micro = [with_padding(batch, 1 + n) for n, batch in enumerate(micro_batches)]
            outputs.clear()
            state.step = step
            results[step + 1] = train_step(
                CONFIG, engine, micro, lr=1e-3, state=state, processes=ALONE
            )
            for batch, output in zip(micro, outputs, strict=True):
                assert recorder.record(step + 1, batch, output.routings) >= 0
            assert recorder.end_step() >= 0
    return results


def shares(trace: Trace, step: int) -> np.ndarray:
    """(L, E) of one step, as the log's router/load_LE."""
    rows = join_rows(list(trace.batches(["expert"], steps=[step])))
    count_LE = np.stack([
        np.bincount(rows.expert_TLK[:, layer].ravel(), minlength=4) for layer in range(2)
    ])  # fmt: skip
    return count_LE.astype(np.float32) / count_LE.sum(axis=1, keepdims=True).astype(np.float32)


def test_the_counts_are_those_of_the_log_token_for_token(text: TokenSplit, tmp_path: Path) -> None:
    results = train_recorded(tmp_path, text, steps=range(3))
    trace = open_trace(tmp_path)
    assert trace.info.steps == (1, 2, 3)
    assert trace.info.kind == "training"
    real = sum(2 * (32 - 1 - n) for n in range(4))
    assert trace.info.num_tokens == 3 * real
    for step, result in results.items():
        assert np.array_equal(shares(trace, step), np.float32(result.load_LE))


def test_rows_say_which_window_document_and_place_a_token_is_of(
    text: TokenSplit, tmp_path: Path
) -> None:
    train_recorded(tmp_path, text, steps=range(1))
    rows = join_rows(list(open_trace(tmp_path).batches()))
    assert rows.step_T is not None
    assert (rows.step_T == 1).all()
    batches = next(training_batches(
        text, seed=5, seq_len=32, batch_size=8, micro_batch_size=2, start_step=0, num_steps=1,
        rank=0, world_size=1, num_workers=0,
    ))  # fmt: skip
    padded = [with_padding(batch, 1 + n) for n, batch in enumerate(batches)]
    real = [batch.document >= 0 for batch in padded]
    for name, values in (("tokens", rows.token_T), ("position", rows.position_T),
                         ("domain", rows.domain_T)):  # fmt: skip
        expected = [getattr(batch, name)[r] for batch, r in zip(padded, real, strict=True)]
        assert values.tolist() == torch.cat(expected).tolist()
    # a document number is of one window and one document in it
    assert len(np.unique(rows.document_T)) == sum(
        len(row[row >= 0].unique()) for batch in padded for row in batch.document
    )
    assert set(rows.document_T // 32) == {int(s) for batch in padded for s in batch.sample}


def test_a_run_that_goes_on_records_each_step_once(text: TokenSplit, tmp_path: Path) -> None:
    train_recorded(tmp_path / "whole", text, steps=range(2))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / ".step_00000003.rank_00000.parquet.77").write_bytes(b"half")
    train_recorded(tmp_path / "resumed", text, steps=range(1, 3), resume_step=1)
    trace = open_trace(tmp_path / "resumed")
    assert trace.info.steps == (1, 2, 3)
    assert [part.step for part in trace.info.parts] == [1, 2, 3]
    first = open_trace(tmp_path / "whole").info.parts[0]
    assert trace.info.parts[0] == first
    assert not list((tmp_path / "resumed").glob(".step*"))
    trace.verify()


def test_a_run_that_starts_again_drops_what_another_left(text: TokenSplit, tmp_path: Path) -> None:
    train_recorded(tmp_path, text, steps=range(2))
    train_recorded(tmp_path, text, steps=range(1))
    assert open_trace(tmp_path).info.steps == (1,)
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_what_lists_the_steps_is_not_written_anew_for_each(
    text: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(
        record_module, "write_info",
        lambda path, info: written.append(len(info.parts)) or write_info(path, info),
    )  # fmt: skip
    model = build_model(CONFIG.model, CONFIG.router, seed=3).eval()
    batch = next(training_batches(
        text, seed=5, seq_len=32, batch_size=2, micro_batch_size=2, start_step=0, num_steps=1,
        rank=0, world_size=1, num_workers=0,
    ))[0]  # fmt: skip
    routings = model(batch.tokens).routings
    with TrainingRecorder(tmp_path, info_of(text), processes=ALONE, resume_step=0) as recorder:
        for step in range(1, 101):
            recorder.record(step, batch, routings)
            recorder.end_step()
            if step == 30:
                recorder.flush()
                assert open_trace(tmp_path).info.steps == tuple(range(1, 31))
    assert open_trace(tmp_path).info.steps == tuple(range(1, 101))
    assert sum(written) < 12 * 100, "100 writings of up to 100 entries would be 5,050"


def test_a_run_that_stops_by_an_error_lists_every_whole_step(
    text: TokenSplit, tmp_path: Path
) -> None:
    recorder = TrainingRecorder(tmp_path, info_of(text), processes=ALONE, resume_step=0)
    model = build_model(CONFIG.model, CONFIG.router, seed=3).eval()
    batch = next(training_batches(
        text, seed=5, seq_len=32, batch_size=2, micro_batch_size=2, start_step=0, num_steps=1,
        rank=0, world_size=1, num_workers=0,
    ))[0]  # fmt: skip
    routings = model(batch.tokens).routings

    def go() -> None:
        with recorder:
            for step in range(1, 21):
                recorder.record(step, batch, routings)
                recorder.end_step()
            recorder._writer._queue.join()
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        go()
    assert open_trace(tmp_path).info.steps == tuple(range(1, 21))


@pytest.mark.parametrize("change", [{"run_id": "other"}, {"logits": False}])
def test_the_routing_of_another_run_is_refused(
    text: TokenSplit, tmp_path: Path, change: dict, hashes
) -> None:
    train_recorded(tmp_path, text, steps=range(1))
    before = hashes(tmp_path)
    with pytest.raises(DataError, match="is of another run, or of this one with other settings"):
        TrainingRecorder(tmp_path, info_of(text, **change), processes=ALONE, resume_step=1)
    assert hashes(tmp_path) == before


@dataclasses.dataclass(frozen=True)
class Rank(Processes):
    """One of two ranks, run one after the other; real processes exchange no more than this."""

    def from_first(self, value: str) -> str:
        return ""


def test_two_ranks_together_hold_each_token_once(text: TokenSplit, tmp_path: Path) -> None:
    for rank in range(2):
        ours = Rank(rank, 2, CPU)
        train_recorded(
            tmp_path / "two", text, steps=range(2), processes=ours, world_size=2,
            vocabulary=b'["a"]',
        )  # fmt: skip
        if rank == 0:  # the other rank has written nothing yet
            assert open_trace(tmp_path / "two").info.steps == ()
    train_recorded(tmp_path / "one", text, steps=range(2))
    two, one = open_trace(tmp_path / "two"), open_trace(tmp_path / "one")
    assert [(part.step, part.rank) for part in two.info.parts] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert two.vocabulary() == ("a",)
    for step in (1, 2):
        windows = [
            np.unique(join_rows(list(t.batches(["document"], steps=[step]))).document_T // 32)
            for t in (one, two)
        ]
        assert np.array_equal(*windows)
    # a step that one rank alone has is left out
    last = two.info.parts[-1]
    (tmp_path / "two" / last.name).unlink()
    with pytest.raises(DataError, match="is missing"):
        open_trace(tmp_path / "two")


def test_ranks_of_different_runs_are_not_mixed(text: TokenSplit, tmp_path: Path) -> None:
    TrainingRecorder(tmp_path, info_of(text), processes=Rank(0, 2, CPU), resume_step=0).close()
    write_info(tmp_path / rank_name(1), info_of(text, run_id="other"))
    with pytest.raises(DataError, match=r"is of another run than trace.rank_00000.json"):
        open_trace(tmp_path)


def test_what_was_recorded_can_be_replayed(text: TokenSplit, tmp_path: Path) -> None:
    train_recorded(tmp_path, text, steps=range(2))
    model = build_model(CONFIG.model, CONFIG.router, seed=3).eval()
    trace = open_trace(tmp_path)
    num_tokens = 0
    for batch in replay_batches(trace, model.config, steps=[2]):
        output = model(batch.tokens_BS, forced=batch.forced)
        valid_T = batch.valid_BS.flatten()
        assert torch.equal(
            output.routings[0].expert_TK[valid_T], batch.forced[0].expert_TK[valid_T]
        )
        num_tokens += int(valid_T.sum())
    assert num_tokens == sum(part.num_tokens for part in trace.info.parts if part.step == 2)
