"""A model and its engine as a run has them: all of it on one process, or this rank's part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from moe.config import TrainConfig
from moe.model.init import KeptPart, WhenReady
from moe.model.transformer import Transformer, build_model
from moe.parallel.engine import Engine, make_engine, module_partitioner
from moe.parallel.expert_parallel import (
    ExpertGroups,
    ExpertParallelDispatcher,
    make_expert_groups,
)
from moe.parallel.processes import Processes
from moe.progress_call import ProgressCall, no_progress
from moe.sparse.dispatch import Placement


class Built(NamedTuple):
    """groups: those that the experts are spread over, if they are."""

    model: Transformer
    engine: Engine
    groups: ExpertGroups | None


def build(
    config: TrainConfig,
    processes: Processes,
    *,
    is_loaded: bool = False,
    progress: ProgressCall = no_progress,
) -> Built:
    """Make both in the layout that the configuration and the number of processes say.

    All ranks call this together. With expert groups a rank has memory for its own experts only,
    with ZeRO 3 for its part of every parameter and one module more while it is made. is_loaded:
    parameters are zero, since a checkpoint's will take their place. progress is told of each module
    that is made.
    """
    parallel, groups, placement = config.parallel, None, None
    if parallel.expert_parallel_size > 1:
        groups = make_expert_groups(parallel.expert_parallel_size, processes)
        held = groups.held(config.model.num_experts)
        placement = Placement(held, ExpertParallelDispatcher(groups))
    model = build_model(
        config.model,
        config.router,
        config.experts,
        seed=None if is_loaded else config.seed,
        device=processes.device,
        dtype=torch.bfloat16 if parallel.bf16_parameters else torch.float32,
        recompute_activations=config.train.activation_checkpointing,
        placement=placement,
        when_ready=_and_tell(module_partitioner(parallel, processes, groups), progress),
    )
    engine = make_engine(model, config.optim, parallel, processes, groups)
    return Built(model, engine, groups)


def _and_tell(partition: WhenReady | None, progress: ProgressCall) -> WhenReady:
    def when_ready(module: nn.Module) -> Mapping[str, KeptPart]:
        progress(1)
        return {} if partition is None else partition(module)

    return when_ready
