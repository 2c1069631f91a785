"""Any number of ranks computes what one process computes, and what a hand-written loop does.

Real processes over gloo, on DeepSpeed's engine, in float32, with gradient accumulation, clipping,
balance and z losses, sampling and input jitter. The windows differ in their number of labels, so
a mean over ranks of means over labels would be another number.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import REPOSITORY, run_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from moe.config import RouterConfig
from moe.data.loader import training_batches
from moe.data.packing import Batch
from moe.data.shards import open_split
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.sparse.losses import load_balance
from moe.sparse.noise import token_keys
from moe.train.metrics import read_metrics

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("train_on_ranks.py")
WORLD_SIZES = (1, 2, 4)
NUM_ROWS, SEQ_LEN, NUM_STEPS = 16, 32, 5
# float32 has 24 bits, 6e-8; sums in another order differ by a few of these
RELATIVE = 1e-6


def cases_of(world_size: int) -> list[dict[str, Any]]:
    """The same 16 rows a step, divided among ranks.

    Global balance counts over the ranks' micro-batches that run at the same time, so 8 rows in all
    layouts: 8 / world_size each. Local balance is a mean over micro-batches of each one's own, so
    layouts agree only where micro-batches hold the same rows: 2 of them, accumulated 8 times on
    one rank, 4 times on two, twice on four.
    """
    shared = NUM_ROWS // 2 // world_size
    cases: list[dict[str, Any]] = [
        {"name": "global", "micro_batch_size": shared, "evaluates": True},
        {"name": "pooled", "micro_batch_size": shared, "balance": "pooled"},
        {"name": "local", "micro_batch_size": 2, "balance_scope": "local"},
    ]
    if world_size == 1:
        cases.append({"name": "plain", "micro_batch_size": shared, "engine": "plain"})
        cases.append({"name": "local8", "micro_batch_size": 8, "balance_scope": "local"})
    if world_size == 2:
        cases.append({"name": "bad_loss", "micro_batch_size": shared, "fault": "loss"})
        cases.append({"name": "bad_gradient", "micro_batch_size": shared, "fault": "gradient"})
    return cases


@dataclass(frozen=True)
class Ended:
    """What one rank ended a case with."""

    steps: list[dict[str, Any]]
    state: dict[str, Any]
    validation: dict[str, float] | None
    parameters: dict[str, Tensor]


class Results:
    """Reads what the ranks wrote: results[world_size, case, rank]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, world_size: int, case: str, *, rank: int = 0) -> Ended:
        path = self._folder / str(world_size) / f"{case}.rank{rank}"
        record = json.loads(Path(f"{path}.json").read_text())
        return Ended(
            record["steps"],
            record["state"],
            record.get("validation"),
            {
                key.split("|")[1]: tensor.view([int(n) for n in key.split("|")[2].split(",")])
                for key, tensor in load_file(f"{path}.safetensors").items()
                if key.startswith("model|")
            },
        )


@pytest.fixture(scope="module")
def results(short_documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in WORLD_SIZES:
        output = folder / str(world_size)
        output.mkdir()
        arguments = [str(short_documents), str(output), json.dumps(cases_of(world_size))]
        run_ranks([sys.executable, str(WORKER), *arguments], world_size, cwd=output)
    return Results(folder)


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Each tensor differs by at most RELATIVE of its largest entry."""
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        error = (tensor.double() - other[name].double()).abs().max() / tensor.abs().max()
        assert error.item() <= RELATIVE, f"{name}: {error.item():.2e}"


def assert_same_training(mine: Ended, other: Ended) -> None:
    for a, b in zip(mine.steps, other.steps, strict=True):
        for key in ("loss", "balance", "z", "total", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=RELATIVE), key
        for key in ("load_LE", "num_labels", "data_hash", "is_skipped"):
            assert a[key] == b[key], key
        for layer, entropy in enumerate(a["entropy_L"]):
            assert entropy == pytest.approx(b["entropy_L"][layer], rel=RELATIVE)
    assert_close(mine.parameters, other.parameters)
    assert mine.state == other.state


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("case", ["global", "pooled", "local"])
def test_ranks_train_as_one_process_does(case: str, world_size: int, results: Results) -> None:
    one = results(1, case)
    assert_same_training(results(world_size, case), one)
    assert min(step["grad_norm"] for step in one.steps) > 0.5  # clipping was on


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_ends_with_the_same_bits(world_size: int, results: Results) -> None:
    first = results(world_size, "global").parameters
    for rank in range(1, world_size):
        other = results(world_size, "global", rank=rank)
        assert other.steps == results(world_size, "global").steps
        for name, tensor in first.items():
            assert torch.equal(tensor, other.parameters[name]), name


def test_the_local_balance_of_other_micro_batches_is_another_loss(results: Results) -> None:
    # so test_ranks_train_as_one_process_does can only compare equal micro-batches
    small, large = results(1, "local").steps[0], results(1, "local8").steps[0]
    assert small["loss"] == pytest.approx(large["loss"], rel=RELATIVE)
    assert abs(small["balance"] - large["balance"]) > 1e-3


def test_deepspeed_on_one_process_is_bitwise_the_plain_engine(results: Results) -> None:
    plain, deepspeed = results(1, "plain"), results(1, "global")
    assert plain.steps == deepspeed.steps
    for name, tensor in plain.parameters.items():
        assert torch.equal(tensor, deepspeed.parameters[name]), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_evaluation_summed_over_ranks_is_the_one_process_evaluation(
    world_size: int, results: Results
) -> None:
    one, several = results(1, "global").validation, results(world_size, "global").validation
    assert one is not None
    assert several == pytest.approx(one, rel=RELATIVE)
    assert several == results(world_size, "global", rank=world_size - 1).validation
    assert len([key for key in one if key.startswith("validation/loss/")]) == 3


@pytest.mark.parametrize("case", ["bad_loss", "bad_gradient"])
def test_both_ranks_skip_a_step_that_is_not_finite_on_one_of_them(
    case: str, results: Results
) -> None:
    ranks = [results(2, case, rank=rank) for rank in range(2)]
    for rank in ranks:
        assert [s["is_skipped"] for s in rank.steps] == [False, False, True, False, False]
        assert rank.state["skipped_steps"] == [2]
        assert math.isnan(rank.steps[2]["grad_norm"])
        sums = [step["first_parameter_sum"] for step in rank.steps]
        assert sums[2] == sums[1]  # not applied
        assert len(set(sums)) == 4  # the others were
        assert all(tensor.isfinite().all() for tensor in rank.parameters.values())
    for name, tensor in ranks[0].parameters.items():
        assert torch.equal(tensor, ranks[1].parameters[name]), name


MODEL = ModelConfig(
    name="nano", vocab_size=512, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16, intermediate_size=16, num_experts=8, top_k=2, initializer_range=0.05,
)  # fmt: skip


def step_batches(data_dir: Path, micro_batch_size: int) -> Iterator[list[Batch]]:
    return training_batches(
        open_split(data_dir, "train", verify=False), seed=3, seq_len=SEQ_LEN, batch_size=NUM_ROWS,
        micro_batch_size=micro_batch_size, start_step=0, num_steps=NUM_STEPS, rank=0, world_size=1,
        num_workers=0,
    )  # fmt: skip


def test_the_windows_would_show_a_mean_of_means(short_documents: Path) -> None:
    for micro_batches in step_batches(short_documents, NUM_ROWS // 4):
        counts = [int((batch.labels != -100).sum()) for batch in micro_batches]
        assert len(set(counts)) > 1
        assert max(counts) / min(counts) > 1.005


def test_one_process_does_what_a_hand_written_loop_does(
    short_documents: Path, results: Results
) -> None:
    """Engine, loss weights, clipping, schedule and optimiser, against torch alone."""
    model = build_model(MODEL, RouterConfig(), seed=3).train()
    decays = [p for n, p in model.named_parameters() if is_decayed(n)]
    others = [p for n, p in model.named_parameters() if not is_decayed(n)]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95), eps=1e-2,
    )  # fmt: skip
    done = results(1, "global")
    for step, micro_batches in enumerate(step_batches(short_documents, NUM_ROWS // 2)):
        total = hand_written_loss(model, micro_batches)
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = [0.005, 0.01, 0.01, 0.0055, 0.001][step]  # 2 of warm-up, then cosine
        optimizer.step()
        assert total.item() == pytest.approx(done.steps[step]["total"], rel=RELATIVE)
        assert norm.item() == pytest.approx(done.steps[step]["grad_norm"], rel=RELATIVE)
    assert_close(dict(model.named_parameters()), done.parameters)


def is_decayed(name: str) -> bool:
    return name.endswith((".query.weight", ".key.weight", ".value.weight", ".output.weight")) or (
        name.endswith((".gate_up", ".down")) or name == "head.weight"
    )


def hand_written_loss(model: torch.nn.Module, micro_batches: list[Batch]) -> Tensor:
    """Mean nats of all labels of the step + 0.1 balance + 0.01 z, means over micro-batches."""
    nats, balances, z_terms, num_labels = [], [], [], 0
    for batch in micro_batches:
        output = model(
            batch.tokens, position_BS=batch.position, document_BS=batch.document,
            key_BS=token_keys(3, batch.sample, seq_len=SEQ_LEN),
        )  # fmt: skip
        is_label = batch.labels != -100
        nats.append(
            functional.cross_entropy(output.logits[is_label], batch.labels[is_label]).double()
            * int(is_label.sum())
        )
        num_labels += int(is_label.sum())
        balances += [load_balance(routing) for routing in output.routings]
        z_terms += [r.logit_TE.logsumexp(dim=-1).square().mean() for r in output.routings]
    mean_balance, mean_z = torch.stack(balances).mean(), torch.stack(z_terms).mean()
    return torch.stack(nats).sum() / num_labels + 0.1 * mean_balance + 0.01 * mean_z


def test_two_processes_of_the_command_make_one_run_folder_and_one_wandb_run(
    short_documents: Path, tmp_path: Path
) -> None:
    train = [
        str(REPOSITORY / "launch/train.py"), "experiment=nano", "logging=offline",
        f"paths.data_dir={short_documents}", "train.steps=5", "optim.warmup_steps=1",
        "train.batch_size=8", "train.save_every=3", "train.precision=float32", "optim.eps=0.01",
        "router.balance_scope=global",
    ]  # fmt: skip
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = [sys.executable, *train, "logging=disabled", "train.micro_batch_size=4"]
    run_ranks(alone, 1, cwd=tmp_path / "one")
    run_ranks([sys.executable, *train, "train.micro_batch_size=2"], 2, cwd=tmp_path / "two")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "rank0.log", "rank1.log", "runs",
    ]  # fmt: skip
    (run_dir,) = (tmp_path / "two/runs/nano").iterdir()
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "two/rank1.log").read_text() == ""  # only the first rank speaks
    (one_dir,) = (tmp_path / "one/runs/nano").iterdir()
    records, of_one = (
        [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] != "checkpoint"]
        for folder in (run_dir, one_dir)
    )
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 5]
    for mine, other in zip(records, of_one, strict=True):
        for key in set(mine) - {"tokens_per_second", "step_seconds", "memory_gib", "mfu"}:
            if isinstance(mine[key], float):
                assert mine[key] == pytest.approx(other[key], rel=1e-5), key
            else:
                assert (
                    mine[key] == pytest.approx(other[key])
                    if key == "router/entropy_L"
                    else (mine[key] == other[key])
                ), key
