"""One rank of measure_scaling.py: trains every case some steps, writes what it sent and held.

python scaling_rank.py OUTPUT_DIR CASES, where CASES is a JSON list of Case's fields; the launcher's
environment variables say which rank this is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels"), str(_ROOT / "launch")]

import torch  # noqa: E402 the path comes first
from rank_meters import Alive, sent_bytes  # noqa: E402
from resident_memory import reset_peak_rss, rss_bytes  # noqa: E402

from moe.config import (  # noqa: E402
    DataConfig,
    LoopConfig,
    OptimConfig,
    ParallelConfig,
    RouterConfig,
    TrainConfig,
)
from moe.data.packing import Batch  # noqa: E402
from moe.model_config import ModelConfig  # noqa: E402
from moe.parallel import deepspeed_engine  # noqa: E402
from moe.parallel.engine import Engine  # noqa: E402
from moe.parallel.processes import Processes, join_processes, leave_processes  # noqa: E402
from moe.plan.layout import Layout, layout_of  # noqa: E402
from moe.plan.memory import bucket_bytes  # noqa: E402
from moe.train.build import build  # noqa: E402
from moe.train.loop import train_step  # noqa: E402
from moe.train.state import TrainState  # noqa: E402

# steps in which memory is measured; the least of them counts, for what Python's garbage collector
# has not found yet is in the others
_MEASURED = 2
_WARM_UP = 2  # ZeRO 3 learns the order of the modules in the first step


@dataclasses.dataclass(frozen=True)
class Case:
    """One layout; world_size is that of the processes."""

    expert_parallel_size: int = 1
    zero_stage: int = 0
    micro_batch_size: int = 2
    num_micro: int = 2
    seq_len: int = 256
    precision: str = "float32"
    bf16_parameters: bool = False
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    num_steps: int = 3  # of those whose time is taken
    model: str = "tiny"
    bucket_elements: int = 0  # DeepSpeed's settings; 0: its own
    live_elements: int = 0
    prefetch_elements: int = 0

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


MODELS = {
    "tiny": ModelConfig(name="tiny"),
    "nano": ModelConfig(
        name="nano", vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, intermediate_size=96, num_experts=8,
    ),
}  # fmt: skip


def config_of(case: Case, world_size: int) -> TrainConfig:
    """The whole configuration of a case: weak scaling, every rank has the same work."""
    return TrainConfig(
        model=MODELS[case.model],
        router=RouterConfig(balance_scope="global"),
        data=DataConfig(seq_len=case.seq_len),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        parallel=ParallelConfig(
            zero_stage=case.zero_stage,
            expert_parallel_size=case.expert_parallel_size,
            bf16_parameters=case.bf16_parameters,
            offload_optimizer=case.offload_optimizer,
        ),
        train=LoopConfig(
            batch_size=case.micro_batch_size * case.num_micro * world_size,
            micro_batch_size=case.micro_batch_size,
            precision=case.precision,
            activation_checkpointing=case.activation_checkpointing,
        ),
    )


def layout_of_case(case: Case, world_size: int) -> Layout:
    """What the planner is asked about a case."""
    config = config_of(case, world_size)
    layout = layout_of(config, world_size=world_size, gpus_per_node=world_size, is_cuda=False)
    return dataclasses.replace(layout, **_settings(case))


def _settings(case: Case) -> dict[str, int]:
    return {name: getattr(case, name) for name in _DEEPSPEED_NAMES if getattr(case, name)}


_DEEPSPEED_NAMES = {
    "bucket_elements": ("reduce_bucket_size",),
    "live_elements": ("stage3_max_live_parameters", "stage3_max_reuse_distance"),
    "prefetch_elements": ("stage3_prefetch_bucket_size",),
}


def measure(case: Case, processes: Processes) -> dict[str, Any]:
    """Bytes sent in a step, the most bytes of tensors in a step, and seconds of steps."""
    config = config_of(case, processes.world_size)
    layout = layout_of_case(case, processes.world_size)
    base = rss_bytes("VmRSS")
    alive = Alive(ignored_bytes=0 if case.bucket_elements else bucket_bytes(layout))
    with alive, _deepspeed_settings(case):
        engine = build(config, processes).engine
        state = TrainState(run_id="0", precision=case.precision)
        steps = _steps(config, engine, state, processes)
        for _ in range(_WARM_UP):
            next(steps)
        measured = [_measured_step(alive, steps) for _ in range(_MEASURED)]
    reset_peak_rss()
    seconds = []
    for _ in range(case.num_steps):
        processes.barrier()
        began = time.perf_counter()
        next(steps)
        seconds.append(time.perf_counter() - began)
    record = {
        "rank": processes.rank,
        **min(measured, key=lambda step: step["peak_bytes"]),
        "bucket_bytes": alive.ignored,
        "peak_rss_bytes": rss_bytes("VmHWM") - base,
        "seconds": seconds,
        "parts": held_bytes(engine),
    }
    steps.close()
    return record


def _measured_step(alive: Alive, steps: Generator[None, None, None]) -> dict[str, Any]:
    gc.collect()
    alive.start()
    between, before = alive.now, _sent()
    next(steps)
    return {
        "sent_bytes": _sent() - before,
        "collectives": alive.calls,
        "state_bytes": between,
        "peak_bytes": alive.most,
    }


@contextlib.contextmanager
def _deepspeed_settings(case: Case) -> Iterator[None]:
    """Give DeepSpeed settings that the configuration of a run has no key for."""
    before = deepspeed_engine._settings

    def changed(*arguments: Any) -> dict[str, Any]:
        settings = before(*arguments)
        for name, value in _settings(case).items():
            settings["zero_optimization"] |= dict.fromkeys(_DEEPSPEED_NAMES[name], value)
        return settings

    deepspeed_engine._settings = changed
    try:
        yield
    finally:
        deepspeed_engine._settings = before


def held_bytes(engine: Any) -> dict[str, int]:
    """Bytes of what lasts from step to step: parameters, masters and moments, each storage once."""
    optimizer: Any = getattr(engine.optimizer, "optimizer", engine.optimizer)
    parameters = {}
    for parameter in engine.model.parameters():
        kept = getattr(parameter, "ds_tensor", parameter)
        parameters[kept.untyped_storage()._cdata] = kept.untyped_storage().nbytes()
    masters, moments = {}, {}
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # ZeRO 3 gives them to the optimiser only while it steps
    updated += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    for parameter in updated:
        storage = parameter.untyped_storage()
        if storage._cdata not in parameters:
            masters[storage._cdata] = storage.nbytes()
    for state in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq"):
            storage = state[key].untyped_storage()
            moments[storage._cdata] = storage.nbytes()
    return {
        "parameters": sum(parameters.values()),
        "masters": sum(masters.values()),
        "moments": sum(moments.values()),
    }


def _sent() -> int:
    return sent_bytes(without_port=int(os.environ.get("MASTER_PORT", "0")))


def _steps(
    config: TrainConfig, engine: Engine, state: TrainState, processes: Processes
) -> Generator[None, None, None]:
    """One training step for each `next`, on random tokens."""
    generator = torch.Generator().manual_seed(processes.rank)
    shape = config.train.micro_batch_size, config.data.seq_len
    while True:
        batches = []
        for _ in range(config.num_accumulation_steps(processes.world_size)):
            tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
            zeros = torch.zeros_like(tokens)
            sample = torch.randint(0, 2**31, shape[:1], generator=generator)
            position = torch.arange(shape[1]).expand(shape)
            batches.append(Batch(tokens, tokens.roll(-1, 1), position, zeros, zeros, sample))
        train_step(config, engine, batches, lr=1e-3, state=state, processes=processes)
        state.step += 1
        yield


def main() -> None:
    """Measure every case, one after the other."""
    output, cases = Path(sys.argv[1]), [Case(**case) for case in json.loads(sys.argv[2])]
    torch.set_num_threads(1)
    processes = join_processes()
    for case in cases:
        record = measure(case, processes)
        gc.collect()
        (output / f"{case.name}.rank{processes.rank}.json").write_text(json.dumps(record))
        if processes.is_first:
            print(case.name, flush=True)
    processes.barrier()
    leave_processes()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo can abort a process that ends with them


if __name__ == "__main__":
    main()
