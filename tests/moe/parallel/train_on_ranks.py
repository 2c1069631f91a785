"""One rank: trains every case a few steps, writes what it ended with.

python train_on_ranks.py DATA_DIR OUTPUT_DIR CASES, where CASES is a JSON list of Case's fields;
the launcher's environment variables say which rank this is.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from rank_end import end_rank
from safetensors.torch import save_file
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
from moe.data.loader import training_batches
from moe.data.shards import open_split
from moe.evaluate import evaluate
from moe.model.transformer import Output, Transformer
from moe.parallel.engine import Engine
from moe.parallel.pieces import HeldRange, ReadRange
from moe.parallel.processes import Processes, join_processes
from moe.train import loop as loop_module
from moe.train import step as step_module
from moe.train.build import Built, build
from moe.train.loop import train_step
from moe.train.optim import learning_rate
from moe.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Case:
    """One training run; fault names what goes wrong in step 2, on the last rank only.

    mutation is a mistake made on purpose in every step, which the comparison must notice.
    """

    name: str
    micro_batch_size: int
    engine: str = "deepspeed"
    balance: str = "per_layer"
    balance_scope: str = "global"
    fault: str = ""
    evaluates: bool = False
    zero_stage: int = 0
    expert_parallel_size: int = 1
    bf16_parameters: bool = False
    offload_optimizer: bool = False
    mutation: str = ""

    @property
    def parallel(self) -> ParallelConfig:
        names = {field.name for field in dataclasses.fields(ParallelConfig)}
        return ParallelConfig(**{k: v for k, v in dataclasses.asdict(self).items() if k in names})


def config_of(case: Case) -> TrainConfig:
    """Clipping, accumulation, balance and z losses, sampling and jitter are all on.

    eps is far above a gradient's rounding error: with 1e-8, AdamW turns a gradient that is only
    rounding error into a step of full size, and no two layouts would agree to six digits.
    """
    return TrainConfig(
        seed=3,
        model=ModelConfig(
            name="nano",
            vocab_size=512,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            intermediate_size=16,
            num_experts=8,
            top_k=2,
            initializer_range=0.05,
        ),
        router=RouterConfig(
            balance_coef=0.1, z_coef=0.01, balance=case.balance, balance_scope=case.balance_scope
        ),
        data=DataConfig(seq_len=32),
        optim=OptimConfig(lr=1e-2, eps=1e-2, warmup_steps=2, grad_clip=0.5),
        parallel=case.parallel,
        train=LoopConfig(
            steps=5,
            batch_size=16,
            micro_batch_size=case.micro_batch_size,
            precision="bfloat16" if case.bf16_parameters else "float32",
        ),
    )


def run_case(case: Case, data_dir: Path, output: Path, processes: Processes) -> None:
    config = config_of(case)
    split = open_split(data_dir, "train", verify=False)
    built = build(config, processes)
    state, steps = TrainState(run_id="0", precision=config.train.precision), []
    is_faulty = bool(case.fault) and processes.rank == processes.world_size - 1
    faults = Faults(built, case.fault if is_faulty else "")
    mutate(built, case.mutation)
    batches = training_batches(
        split,
        seed=config.seed,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        micro_batch_size=case.micro_batch_size,
        start_step=0,
        num_steps=config.train.steps,
        rank=processes.rank,
        world_size=processes.world_size,
        num_workers=0,
    )
    for micro_batches in batches:
        faults.is_on = state.step == 2
        lr = learning_rate(state.step, config=config.optim, num_steps=config.train.steps)
        result = train_step(config, faults, micro_batches, lr=lr, state=state, processes=processes)
        state.step += 1
        first = next((one.values.double().sum().item() for one in built.engine.held()), 0.0)
        steps.append(dataclasses.asdict(result) | {"first_parameter_sum": first})
    record = {"steps": steps, "state": dataclasses.asdict(state)}
    if case.evaluates:
        record["validation"] = evaluate_validation(built.model, data_dir, processes)
    path = output / f"{case.name}.rank{processes.rank}"
    path.with_suffix(f"{path.suffix}.json").write_text(json.dumps(record))
    save_file(held_tensors(built.engine), path.with_suffix(f"{path.suffix}.safetensors"))


def held_tensors(engine: Engine) -> dict[str, Tensor]:
    """What this rank holds, replicas too, each as stem|name|shape|first element."""
    tensors = {}
    for one in engine.held():
        place = f"{','.join(map(str, one.shape))}|{one.start}"
        tensors[f"model|{one.name}|{place}"] = one.values.clone()
        for key, values in one.moments.items():
            tensors[f"optimizer|{one.name}.{key}|{place}"] = values.clone()
    return tensors


def mutate(built: Built, mutation: str) -> None:
    """Make a mistake that people have made (DeepSpeed#5259, transformers#48687)."""
    model, groups = built.model, built.groups
    if mutation == "expert gradients scaled by the group's size":
        assert groups is not None
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.register_hook(lambda gradient: gradient * groups.size)
    elif mutation == "router gradient dropped":
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.register_hook(torch.zeros_like)
    elif mutation == "balance loss counted twice":
        once = step_module.routing_losses

        def twice(*arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
            balance, z = once(*arguments, **named)
            return balance * 2, z

        step_module.routing_losses = twice
    else:
        assert not mutation, mutation


def evaluate_validation(
    model: Transformer, data_dir: Path, processes: Processes
) -> dict[str, float]:
    return evaluate(
        model,
        open_split(data_dir, "validation", verify=False),
        seq_len=32,
        batch_size=3,
        max_tokens=1500,
        precision=torch.float32,
        processes=processes,
    )


class Faults:
    """The engine, with a loss or a gradient of this rank that is not finite while is_on.

    "reported": the loss alone is not, as where a target is masked; every gradient is finite.
    """

    def __init__(self, built: Built, fault: str) -> None:
        self._engine, self._fault, self.is_on = built.engine, fault, False
        self.model = built.model
        once = step_module.loss_terms

        def terms(*arguments: Any, **named: Any) -> step_module.LossTerms:
            made = once(*arguments, **named)
            if fault == "reported" and self.is_on:
                return dataclasses.replace(made, cross_entropy_sum=made.balance + math.inf)
            return made

        loop_module.loss_terms = terms
        if fault == "gradient":
            # before the ranks' gradients meet, as a real fault would be
            self.model.get_parameter("norm.weight").register_hook(self._spoil)

    def _spoil(self, gradient: Tensor) -> Tensor:
        return gradient * float("nan") if self.is_on else gradient

    def forward(self, *inputs: Tensor, **named: Tensor | None) -> object:
        output = self._engine.forward(*inputs, **named)
        assert isinstance(output, Output)
        if self._fault == "loss" and self.is_on:
            return output._replace(logits=output.logits * float("inf"))
        return output

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self._engine.backward(loss, is_last=is_last)

    def step(self, *, lr: float) -> float:
        return self._engine.step(lr=lr)

    def discard(self) -> None:
        self._engine.discard()

    def held(self) -> list[HeldRange]:
        return self._engine.held()

    def load(self, read: ReadRange, *, with_moments: bool) -> None:
        self._engine.load(read, with_moments=with_moments)


def main() -> None:
    data_dir, output, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    processes = join_processes()
    for case in cases:
        run_case(Case(**case), data_dir, output, processes)
    end_rank(processes)


if __name__ == "__main__":
    main()
