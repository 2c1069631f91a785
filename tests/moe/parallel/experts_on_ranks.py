"""One rank of test_expert_parallel.py: a sparse layer over expert groups, what it made and sent.

python experts_on_ranks.py OUTPUT_DIR CASES; the launcher's environment says which rank this is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rank_end import end_rank
from safetensors.torch import save_file
from torch import Tensor

from moe.config import ExpertsConfig, RouterConfig
from moe.model.init import materialise
from moe.model_config import ModelConfig
from moe.parallel.expert_parallel import (
    ExpertParallelDispatcher,
    bytes_sent,
    make_expert_groups,
)
from moe.parallel.processes import Processes, join_processes
from moe.sparse.dispatch import (
    Dispatcher,
    Exchange,
    ExpertInput,
    LocalDispatcher,
    Placement,
)
from moe.sparse.layer import MoELayer
from moe.sparse.router import Routing

MODEL = ModelConfig(
    hidden_size=16, intermediate_size=8, num_experts=8, num_layers=1, initializer_range=0.3
)
NUM_TOKENS = (7, 0, 12, 5)  # of each of four ranks: uneven, and one without any


def tokens_of(rank: int, num_ranks: int) -> Tensor:
    """The four parts' tokens, divided among ranks in order; the same numbers in every layout."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in NUM_TOKENS]
    each = len(parts) // num_ranks
    return torch.cat(parts[rank * each : (rank + 1) * each])


class Recorder:
    """A dispatcher that remembers what went through it, for the test to look at."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner, self.seen = inner, []

    def dispatch(
        self, x_TD: Tensor, routing: Routing, *, num_experts: int
    ) -> tuple[ExpertInput, Exchange | None]:
        sent, exchange = self.inner.dispatch(x_TD, routing, num_experts=num_experts)
        self.seen.append((sent, exchange))
        return sent, exchange

    def combine(self, y_RD: Tensor, routing: Routing, exchange: Exchange | None) -> Tensor:
        return self.inner.combine(y_RD, routing, exchange)


def run_case(case: dict, output: Path, processes: Processes) -> None:
    groups = make_expert_groups(case["size"], processes) if case["size"] > 1 else None
    held = range(8) if groups is None else groups.held(8)
    recorder = Recorder(LocalDispatcher() if groups is None else ExpertParallelDispatcher(groups))
    layer = MoELayer(
        MODEL, RouterConfig(name="topk"), ExpertsConfig(backend="reference"), layer=0,
        placement=Placement(held, recorder),
    )  # fmt: skip
    root = torch.nn.ModuleDict({"a": layer}).double().to("meta")
    materialise(root, MODEL, seed=5, device="cpu", first_expert=held.start)
    if case["skew"]:  # every token to the experts of the first process
        with torch.no_grad():
            layer.router.weight[2:] = 0
            layer.router.weight[:2] *= 100
    x_BSD = tokens_of(processes.rank, processes.world_size)[None].requires_grad_()
    moved: list[int] = []
    real = dist.all_to_all_single

    def counted(received, sent, received_sizes=None, sent_sizes=None, group=None):
        if sent_sizes is not None:
            assert groups is not None
            others = [n for p, n in enumerate(sent_sizes) if p != groups.place]
            moved.append(sum(others) * sent.shape[1] * sent.element_size())
        return real(received, sent, received_sizes, sent_sizes, group=group)

    dist.all_to_all_single = counted
    try:
        y_BSD, routing = layer(x_BSD, None)
        (y_BSD * torch.arange(16.0)).sum().backward()
    finally:
        dist.all_to_all_single = real
    gradients = {name: p.grad.contiguous() for name, p in layer.named_parameters()}
    name = f"{case['name']}.rank{processes.rank}"
    save_file(
        {"y": y_BSD.detach()[0].contiguous(), "x": x_BSD.grad[0].contiguous(), **gradients},
        output / f"{name}.safetensors",
    )
    ((_, exchange),) = recorder.seen
    record = {"held": list(held), "moved": moved, "count_E": routing.count_E.tolist()}
    if exchange is not None and groups is not None:
        record["sent_P"], record["received_P"] = exchange.sent_P, exchange.received_P
        record["expected"] = bytes_sent(exchange, groups, width=16, element_size=8)
    (output / f"{name}.json").write_text(json.dumps(record))


def main() -> None:
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    processes = join_processes()
    for case in cases:
        run_case(case, output, processes)
    end_rank(processes)


if __name__ == "__main__":
    main()
