"""train.upcycle: the dense model's function and weights, in every layout, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor
from upcycle_cases import DENSE, SPARSE, SUM_TO_ONE, TOKENS_BS, save_dense, sparse_config

from moe.config import (
    DataConfig,
    LoggingConfig,
    LoopConfig,
    OptimConfig,
    ParallelConfig,
    PathsConfig,
    RouterConfig,
    TrainConfig,
)
from moe.convert.export_model import export_model
from moe.convert.import_model import import_model
from moe.errors import CheckpointError, ConfigError
from moe.load_run import load_run, open_run
from moe.model.transformer import Transformer, build_model
from moe.parallel.processes import Processes
from moe.train.build import build
from moe.train.checkpoint import open_checkpoint
from moe.train.init_from import load_initial_weights
from moe.train.run import run
from moe.train.upcycle import reader_of_copies

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
WORKER = Path(__file__).parents[1] / "parallel/upcycle_on_ranks.py"
EPS = torch.finfo(torch.float32).eps


def quiet(*_: object) -> None:
    pass


def load(folder: str) -> Transformer:
    return load_run(folder, device=CPU, on_skip=pytest.fail).model


def upcycled(folder: str, *, say: Callable[[str], None] = quiet, **changes: Any) -> Transformer:
    config = sparse_config(folder, **changes)
    built = build(config, ALONE)
    load_initial_weights(built.engine, config, tokenizer_sha256="", say=say)
    return built.model.eval()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_dense(tmp_path_factory.mktemp("dense"))


def require_same_logits(sparse: Transformer, parent: Transformer) -> None:
    with torch.no_grad():
        expected, got = parent(TOKENS_BS).logits, sparse(TOKENS_BS).logits
    # two weights that sum to one within a bit, and two layers of sums in another order
    assert float((got - expected).abs().max()) <= 16 * EPS * float(expected.abs().max())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_with_weights_that_sum_to_one_it_computes_what_the_dense_model_does(
    dense: str, top_k: int
) -> None:
    model = upcycled(dense, model=dataclasses.replace(SPARSE, top_k=top_k))
    require_same_logits(model, load(dense))


@torch.no_grad()
@pytest.mark.parametrize("router", [RouterConfig(), RouterConfig(name="topk")])
def test_a_block_is_the_dense_one_times_the_sum_of_its_weights(
    dense: str, router: RouterConfig
) -> None:
    parent, model = load(dense), upcycled(dense, router=router)
    x_BSD = torch.randn(3, 50, 32, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(model.blocks, parent.blocks, strict=True):
        y_BSD, routing = ours.feed_forward(x_BSD, None)
        sum_BS = routing.weight_TK.sum(dim=1).view(3, 50)
        expected = theirs.feed_forward(x_BSD, None)[0] * sum_BS[..., None]
        assert (y_BSD - expected).abs().max() <= 8 * EPS * expected.abs().max()
        assert (sum_BS - 1).abs().min() > 1e-3  # so that the factor is seen


def test_each_expert_is_the_dense_block_and_the_router_is_that_of_the_seed(dense: str) -> None:
    parent = dict(load(dense).named_parameters())
    fresh = dict(build_model(SPARSE, SUM_TO_ONE, seed=3).named_parameters())
    used = set()
    for name, weight in upcycled(dense).named_parameters():
        if ".router." in name:
            assert torch.equal(weight, fresh[name]), name
            continue
        old_name = name.replace(".experts.", ".") + ".weight" * (".experts." in name)
        used.add(old_name)
        assert torch.equal(weight, parent[old_name].expand_as(weight)), name
        assert not torch.equal(weight, fresh[name]), name
    assert used == parent.keys()


def test_a_range_of_experts_is_read_once_and_repeated() -> None:
    shapes = {"blocks.0.feed_forward.experts.down": (4, 5, 3)}
    whole = torch.arange(15.0).repeat(4)
    num_read = 0

    def read(stem: str, name: str, start: int, into: Tensor) -> None:
        nonlocal num_read
        assert (stem, name) == ("model", "blocks.0.feed_forward.down.weight")
        into.copy_(torch.arange(15.0)[start : start + len(into)])
        num_read += len(into)

    read_copied = reader_of_copies(read, shapes)
    for start in range(60):
        for end in range(start, 61):
            into, num_read = torch.full((end - start,), -1.0), 0
            read_copied("model", "blocks.0.feed_forward.experts.down", start, into)
            assert torch.equal(into, whole[start:end]), (start, end)
            assert num_read == min(15, end - start)


# of 5 experts a rank of ZeRO holds two and a half
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"expert_parallel_size": 2, "zero_stage": 0}),
    (4, {"expert_parallel_size": 2, "zero_stage": 1}),
    (4, {"expert_parallel_size": 2, "zero_stage": 3}),
    (5, {"expert_parallel_size": 1, "zero_stage": 2}),
    (5, {"expert_parallel_size": 1, "zero_stage": 3}),
]


@pytest.mark.slow
def test_two_processes_load_the_bits_of_one_in_every_layout(dense: str, tmp_path: Path) -> None:
    run_ranks(
        [sys.executable, str(WORKER), dense, str(tmp_path), json.dumps(LAYOUTS)], 2, cwd=tmp_path
    )
    for number, (num_experts, layout) in enumerate(LAYOUTS):
        model = upcycled(dense, model=dataclasses.replace(SPARSE, num_experts=num_experts))
        expected = {name: p.detach() for name, p in model.named_parameters()}
        with torch.no_grad():
            logits = model(TOKENS_BS).logits
        saved = open_checkpoint(tmp_path / str(number) / "step_00000000").tensors("model")
        assert saved.keys() == expected.keys(), layout
        for name, weight in expected.items():
            assert torch.equal(saved[name], weight), (layout, name)
        # and what a rank computes with, which ZeRO keeps apart from what it updates
        for rank in range(2):
            made = load_file(tmp_path / str(number) / f"rank{rank}.safetensors")["logits"]
            assert torch.allclose(made, logits, rtol=0, atol=1e-5), (layout, rank)


def test_a_converted_model_in_bfloat16_is_a_parent_too(tmp_path: Path) -> None:
    shape = dataclasses.replace(DENSE, norm="rmsnorm", attention_bias=False, head_bias=False)
    parent = save_dense(tmp_path, model=shape, dtype=torch.bfloat16)
    export_model(
        open_run(parent, on_skip=pytest.fail), tmp_path / "hf", window=None,
        max_shard_bytes=20_000, on_progress=quiet,
    )  # fmt: skip
    import_model(
        tmp_path / "hf", tmp_path / "ours", window="original", tokenizer=None, on_progress=quiet
    )
    loaded = load_run(str(tmp_path / "ours"), device=CPU, on_skip=pytest.fail)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    model = dataclasses.replace(loaded.config.model, num_experts=4)
    require_same_logits(upcycled(str(tmp_path / "ours"), model=model), loaded.model.float())


def run_config(data: Path, run_dir: Path, *, model: Any, lr: float, **loop: Any) -> TrainConfig:
    return TrainConfig(
        seed=3, model=model, router=SUM_TO_ONE, data=DataConfig(seq_len=64),
        optim=OptimConfig(warmup_steps=0, lr=lr), parallel=ParallelConfig(engine="plain"),
        logging=LoggingConfig(wandb="disabled"),
        train=LoopConfig(
            batch_size=2, micro_batch_size=2, precision="float32", evaluate_every=0,
            evaluate_tokens=2000, save_every=0, sample_tokens=0, **loop,
        ),
        paths=PathsConfig(data_dir=str(data), run_dir=str(run_dir)),
    )  # fmt: skip


def test_a_run_goes_on_from_a_dense_run_and_its_experts_part(
    short_documents: Path, tmp_path: Path
) -> None:
    run(run_config(short_documents, tmp_path / "dense", model=DENSE, steps=3, lr=1e-2), say=quiet)
    said: list[str] = []
    config = run_config(
        short_documents, tmp_path / "sparse", model=SPARSE, steps=1, lr=1e-3,
        init_from=str(tmp_path / "dense"), upcycle=True,
    )  # fmt: skip
    run(config, say=said.append)
    lines = [line for line in said if line.startswith(("weights:", "upcycled:", "note:"))]
    assert lines == [
        f"weights: from {tmp_path}/dense/checkpoints/step_00000003, step 3",
        "upcycled: 4 experts in each of 2 layers are copies of its feed-forward block; attention, "
        "norms, embeddings and head are copied; the routers start anew from seed 3",
    ]
    for name, weight in load(str(tmp_path / "sparse")).named_parameters():
        if ".experts." in name:
            for expert in range(1, 4):
                assert not torch.equal(weight[0], weight[expert]), (name, expert)
    # gone on with, it needs no parent
    (tmp_path / "dense").rename(tmp_path / "away")
    said.clear()
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    run(longer, say=said.append)
    assert not any(line.startswith("upcycled:") for line in said)


def test_another_scale_is_said(dense: str) -> None:
    said: list[str] = []
    upcycled(dense, router=RouterConfig(), say=said.append)
    assert "begins as the dense one times the sum of its router weights" in said[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 24}, "model.intermediate_size: it has 16, this run asks for 24"),
        ({"attention_bias": False}, "model.attention_bias: it has True, this run asks for False"),
        ({"sliding_window": 8}, "model.sliding_window: it has None, this run asks for 8"),
    ],
)
def test_anything_but_experts_and_router_must_be_the_same(
    dense: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        upcycled(dense, model=dataclasses.replace(SPARSE, **changes))
    text = str(caught.value)
    assert text.startswith(f"train.upcycle: {dense} is the dense form of another model: {message}.")
    assert "num_experts: it has" not in text


@pytest.mark.parametrize(
    "changes",
    [{"feed_forward": "gegelu"}, {"feed_forward_bias": True}, {"feed_forward_dropout": 0.5}],
)
def test_a_block_that_is_no_expert_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    parent = save_dense(tmp_path, model=dataclasses.replace(DENSE, **changes))
    with pytest.raises(CheckpointError, match=rf"model\.{next(iter(changes))}: it has"):
        upcycled(parent)


def test_a_parent_with_experts_is_refused(tmp_path: Path) -> None:
    parent = save_dense(tmp_path, model=SPARSE)
    with pytest.raises(CheckpointError, match=r"has 4 experts already; .* train\.upcycle=false"):
        upcycled(parent)


def test_a_dense_parent_without_the_key_is_refused_with_the_key(dense: str) -> None:
    config = sparse_config(dense)
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, upcycle=False))
    with pytest.raises(CheckpointError, match=r"train\.upcycle=true to copy its dense blocks"):
        load_initial_weights(build(plain, ALONE).engine, plain, tokenizer_sha256="", say=quiet)


def test_the_key_alone_or_on_a_dense_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^train\.upcycle: got true without train\.init_from"):
        LoopConfig(upcycle=True)
    with pytest.raises(ConfigError, match=r"^train\.upcycle: got true with model dense, which has"):
        sparse_config("anywhere", model=DENSE)
