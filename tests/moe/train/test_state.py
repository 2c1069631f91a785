"""A checkpoint brings everything back to the bit, and is refused by every other run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from moe.config import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    TrainConfig,
)
from moe.errors import CheckpointError
from moe.model.transformer import build_model
from moe.parallel.engine import Engine, make_engine
from moe.parallel.processes import Processes
from moe.sparse.noise import token_keys
from moe.train.checkpoint import Checkpoint, find_checkpoint, save_checkpoint
from moe.train.checkpoint_writer import CheckpointWriter
from moe.train.state import TrainState, load_model, refuse_other_run, restore_state, save_state

ALONE = Processes(0, 1, torch.device("cpu"))
FINGERPRINT = "f" * 64
CONFIG = TrainConfig(
    model=ModelConfig(
        name="nano",
        vocab_size=64,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=8,
        num_experts=4,
    ),
    data=DataConfig(seq_len=12),
    optim=OptimConfig(warmup_steps=1),
    parallel=ParallelConfig(engine="plain"),
    train=LoopConfig(steps=9, batch_size=8, micro_batch_size=4),
)


def engine_of(config: TrainConfig, *, seed: int = 0) -> Engine:
    model = build_model(config.model, config.router, config.experts, seed=seed)
    return make_engine(model, config.optim, config.parallel, ALONE)


def train_a_little(engine: Engine, *, num_steps: int, first: int = 0) -> None:
    engine.model.train()
    for step in range(first, first + num_steps):
        tokens = torch.arange(24).view(2, 12) + step
        output: Any = engine.forward(tokens, key_BS=token_keys(0, torch.arange(2), seq_len=12))
        engine.backward(output.logits.logsumexp(dim=-1).square().mean(), is_last=True)
        engine.step(lr=1e-2)


def save(
    folder: Path, engine: Engine, state: TrainState, config: TrainConfig = CONFIG
) -> Checkpoint:
    (folder / "tokenizer.model").write_bytes(b"pieces")
    writer = CheckpointWriter(
        folder / "checkpoints", processes=ALONE, keep_last=3, in_background=False
    )
    save_state(
        writer,
        engine,
        state,
        config=asdict(config),
        data_fingerprint=FINGERPRINT,
        tokenizer_path=folder / "tokenizer.model",
    )
    checkpoint = find_checkpoint(folder / "checkpoints", on_skip=pytest.fail)
    assert checkpoint is not None
    return checkpoint


def restore(checkpoint: Checkpoint, engine: Engine, config: TrainConfig = CONFIG) -> TrainState:
    return restore_state(checkpoint, engine, config=config, data_fingerprint=FINGERPRINT)


def everything(engine: Engine) -> dict[str, Tensor]:
    found = {}
    for name, parameter in engine.model.named_parameters():
        found[name] = parameter.detach().clone()
        for key, value in engine.optimizer.state.get(parameter, {}).items():
            found[f"{name}.{key}"] = value.clone()
    return found


def same_bits(mine: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return mine.keys() == other.keys() and all(
        mine[name].numpy().tobytes() == other[name].numpy().tobytes() for name in mine
    )


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    engine = engine_of(CONFIG)
    train_a_little(engine, num_steps=3)
    return save(tmp_path, engine, TrainState(run_id="ab", precision="float32", step=3))


def test_everything_comes_back_to_the_bit_and_goes_on_the_same(tmp_path: Path) -> None:
    engine = engine_of(CONFIG)
    train_a_little(engine, num_steps=3)
    state = TrainState("cafe", "bfloat16", 3, 1234, 2, [0, 2])
    checkpoint = save(tmp_path, engine, state)
    other = engine_of(CONFIG, seed=9)
    assert restore(checkpoint, other) == state
    assert same_bits(everything(other), everything(engine))
    # three optimiser tensors for each parameter
    assert len(everything(other)) == 4 * len(list(engine.model.parameters()))
    train_a_little(engine, num_steps=2, first=3)
    train_a_little(other, num_steps=2, first=3)
    assert same_bits(everything(other), everything(engine))


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), float(numpy.random.random()), torch.rand(3).tolist()]

    checkpoint = save(tmp_path, engine_of(CONFIG), TrainState("ab", "float32"))
    expected = draw()
    restore(checkpoint, engine_of(CONFIG))
    assert draw() == expected


def test_a_checkpoint_from_before_any_applied_step_leaves_a_new_optimizer(tmp_path: Path) -> None:
    # every step so far was skipped: AdamW has no moments yet
    checkpoint = save(tmp_path, engine_of(CONFIG), TrainState("ab", "float32", 1, 0, 1, [0]))
    other = engine_of(CONFIG, seed=9)
    restore(checkpoint, other)
    assert len(other.optimizer.state) == 0
    assert same_bits(everything(other), everything(engine_of(CONFIG)))


def test_tied_parameters_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, tie_embeddings=True))
    engine = engine_of(config)
    train_a_little(engine, num_steps=1)
    checkpoint = save(tmp_path, engine, TrainState("ab", "float32", 1), config)
    assert "head.weight" not in checkpoint.tensors("model")
    other = engine_of(config, seed=9)
    restore(checkpoint, other, config)
    assert same_bits(everything(other), everything(engine))
    head, embed = (other.model.get_parameter(n) for n in ("head.weight", "embed.weight"))
    assert head.data_ptr() == embed.data_ptr()


Change = Callable[[TrainConfig], TrainConfig]


def within(group: str, **values: Any) -> Change:
    return lambda config: replace(config, **{group: replace(getattr(config, group), **values)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: replace(c, seed=1), "seed: the checkpoint has 0, this run asks for 1"),
        (within("model", hidden_size=32), "model.hidden_size: the checkpoint has 16"),
        (within("model", num_experts=8), "model.num_experts: the checkpoint has 4"),
        (within("model", rope=replace(CONFIG.model.rope, theta=5.0)), "model.rope.theta"),
        (within("router", input_jitter=0.0), "router.input_jitter: the checkpoint has 0.01"),
        (lambda c: replace(c, router=RouterConfig(name="topk")), "router.name"),
        (within("data", seq_len=10), "data.seq_len: the checkpoint has 12"),
        (within("train", batch_size=4), "train.batch_size: the checkpoint has 8"),
        (within("train", overfit=True), "train.overfit: the checkpoint has False"),
        (within("train", precision="bfloat16"), "train.precision: the checkpoint has 'float32'"),
    ],
)
def test_another_run_is_refused_by_name_before_a_weight_is_touched(
    change: Change, words: str, saved: Checkpoint
) -> None:
    config = change(CONFIG)
    engine = engine_of(config, seed=9)
    before = everything(engine)
    torch.manual_seed(1)
    random_before = torch.get_rng_state()
    with pytest.raises(CheckpointError) as caught:
        restore(saved, engine, config)
    assert words in str(caught.value)
    assert "belongs to another run" in str(caught.value)
    assert same_bits(everything(engine), before)
    assert torch.equal(torch.get_rng_state(), random_before)


def test_every_difference_is_named_at_once(saved: Checkpoint) -> None:
    config = within("train", batch_size=4)(within("model", num_layers=2)(CONFIG))
    with pytest.raises(CheckpointError, match=r"model.num_layers.*; train.batch_size"):
        restore(saved, engine_of(config), config)


def test_other_prepared_data_are_refused(saved: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="data/python: the prepared data are not those"):
        refuse_other_run(saved, config=CONFIG, data_fingerprint="0" * 64)


@pytest.mark.parametrize(
    "change",
    [
        within("optim", lr=1.0, schedule="wsd", grad_clip=0.0),
        # what was prepared is compared by its fingerprint, not by what this command calls it
        within("data", sources=("other",), name="other"),
        within("tokenizer", vocab_size=512),
        within("train", steps=99, micro_batch_size=2, save_every=1, precision="float32"),
        within("train", activation_checkpointing=True, keep_last=1),
        within("data", num_workers=2, verify=False, name="other"),
        within("tokenizer", train_bytes=5000, model_path="x"),
        within("experts", backend="reference"),
        within("logging", wandb="disabled"),
        lambda c: replace(c, name="other"),
    ],
)
def test_what_does_not_make_another_run_may_change(change: Change, saved: Checkpoint) -> None:
    config = change(CONFIG)
    state = restore(saved, engine_of(config, seed=9), config)
    assert state.step == 3


def test_another_layout_is_the_same_run(saved: Checkpoint) -> None:
    config = within("parallel", engine="deepspeed", zero_stage=3, expert_parallel_size=2)(CONFIG)
    refuse_other_run(saved, config=config, data_fingerprint=FINGERPRINT)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_parameters_that_are_not_the_models_are_named_and_none_is_loaded(
    damage: str, tmp_path: Path
) -> None:
    engine = engine_of(CONFIG)
    tensors = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    if damage == "missing":
        del tensors["norm.weight"]
    elif damage == "extra":
        tensors["norm.other"] = torch.zeros(1)
    else:
        tensors["norm.weight"] = torch.zeros(3)
    save_checkpoint(tmp_path, 1, tensors={"model": tensors}, state={}, keep_last=1)
    checkpoint = find_checkpoint(tmp_path, on_skip=pytest.fail)
    assert checkpoint is not None
    other = engine_of(CONFIG, seed=9)
    before = everything(other)
    with pytest.raises(CheckpointError, match=r"not this model's \(norm\.(weight|other)\)"):
        load_model(other.model, checkpoint)
    assert same_bits(everything(other), before)
