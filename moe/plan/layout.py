"""How a training run is spread over processes: the input of every formula of the planner."""

from __future__ import annotations

from dataclasses import dataclass

from moe.config import ExpertsConfig, RouterConfig, TrainConfig
from moe.errors import ConfigError
from moe.model_config import ModelConfig
from moe.plan_config import PlanConfig


@dataclass(frozen=True)
class Layout:
    """One training run on world_size ranks; rank r is on node r // gpus_per_node."""

    model: ModelConfig
    router: RouterConfig
    experts: ExpertsConfig
    world_size: int
    gpus_per_node: int
    expert_parallel_size: int  # P: ranks that together hold every expert once
    zero_stage: int
    micro_batch_size: int  # windows of a forward pass of one rank
    num_micro: int  # forward passes of one rank in an optimiser step
    seq_len: int
    dtype: str  # of matrix products: bfloat16 or float32
    activation_checkpointing: bool
    bf16_parameters: bool  # parameters in bfloat16, float32 masters in the optimiser
    offload_optimizer: bool  # masters and moments in the CPU's memory
    is_cuda: bool = True
    # DeepSpeed's settings, in elements; the defaults are its own
    bucket_elements: int = 500_000_000  # reduce_bucket_size: gradients that are reduced at once
    # stage3_max_live_parameters and stage3_max_reuse_distance: the most that are gathered at once
    live_elements: int = 1_000_000_000
    prefetch_elements: int = 50_000_000  # stage3_prefetch_bucket_size

    def __post_init__(self) -> None:
        size, world = self.expert_parallel_size, self.world_size
        if size > 1 and not self.model.is_sparse:
            raise ConfigError(
                f"parallel.expert_parallel_size: got {size} with a model without experts "
                f"({self.model.name}); allowed: 1."
            )
        for count, what in ((world, "processes"), (self.model.num_experts or size, "experts")):
            if count % size:
                raise ConfigError(
                    f"parallel.expert_parallel_size: got {size} with {count} {what}, which it does "
                    f"not divide; allowed here: {', '.join(map(str, self.expert_sizes()))}. Choose "
                    "one of these."
                )
        if world > self.gpus_per_node and world % self.gpus_per_node:
            raise ConfigError(
                f"processes: got {world} on nodes of {self.gpus_per_node}; it must be a multiple, "
                "or at most one node's. Change the number of processes or of GPUs a node."
            )
        if self.seq_len > self.model.usable_length:
            raise ConfigError(
                f"seq_len: got {self.seq_len}; model {self.model.name} takes at most "
                f"{self.model.usable_length}. Set it to {self.model.usable_length} or less."
            )
        for name in ("offload_optimizer", "bf16_parameters"):
            if getattr(self, name) and self.zero_stage == 0:
                raise ConfigError(
                    f"parallel.{name}: got true with parallel.zero_stage=0; the optimiser must be "
                    "partitioned for it. Use parallel.zero_stage=1, 2 or 3."
                )

    def expert_sizes(self) -> list[int]:
        """The sizes that an expert group can have on so many ranks."""
        experts = self.model.num_experts or 1
        most = min(self.world_size, experts)
        return [n for n in range(1, most + 1) if not (self.world_size % n or experts % n)]

    @property
    def num_nodes(self) -> int:
        return -(-self.world_size // self.gpus_per_node)

    @property
    def expert_data_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.world_size // self.expert_parallel_size

    @property
    def tokens_of_pass(self) -> int:
        """Tokens of one forward pass of one rank."""
        return self.micro_batch_size * self.seq_len

    @property
    def tokens_of_rank(self) -> int:
        """Tokens of one rank in an optimiser step."""
        return self.tokens_of_pass * self.num_micro

    @property
    def parameter_bytes(self) -> int:
        return 2 if self.bf16_parameters else 4

    @property
    def gradient_bytes(self) -> int:
        """Of a gradient that is added up and reduced: float32 whatever the parameters are."""
        return 4

    @property
    def product_bytes(self) -> int:
        """Of a number that enters a matrix product."""
        return 2 if self.dtype == "bfloat16" else 4

    def expert_group(self, rank: int) -> range:
        """The ranks among which this one's experts and those of others are exchanged."""
        first = rank - rank % self.expert_parallel_size
        return range(first, first + self.expert_parallel_size)

    def expert_data_group(self, rank: int) -> range:
        """The ranks that hold the same experts as this one."""
        return range(rank % self.expert_parallel_size, self.world_size, self.expert_parallel_size)

    def data_group(self) -> range:
        """All ranks: they share everything but the experts."""
        return range(self.world_size)

    def neighbours(self, group: range, rank: int) -> int:
        """How many of the group are on this rank's node, itself included."""
        node = rank // self.gpus_per_node
        return sum(1 for other in group if other // self.gpus_per_node == node)


def layout_of(
    config: TrainConfig, *, world_size: int, gpus_per_node: int, is_cuda: bool = True
) -> Layout:
    """The layout of a configured run; precision "auto" counts as bfloat16."""
    parallel = config.parallel
    return Layout(
        model=config.model,
        router=config.router,
        experts=config.experts,
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        expert_parallel_size=parallel.expert_parallel_size,
        zero_stage=parallel.zero_stage,
        micro_batch_size=config.train.micro_batch_size,
        num_micro=config.num_accumulation_steps(world_size),
        seq_len=config.data.seq_len,
        dtype="float32" if config.train.precision == "float32" else "bfloat16",
        activation_checkpointing=config.train.activation_checkpointing,
        bf16_parameters=parallel.bf16_parameters,
        offload_optimizer=parallel.offload_optimizer,
        is_cuda=is_cuda,
    )


def planned_layout(config: PlanConfig) -> Layout:
    """The layout that launch/plan.py is asked about."""
    return Layout(
        model=config.model,
        router=config.router,
        experts=config.experts,
        world_size=config.num_gpus,
        gpus_per_node=config.cluster.gpus_per_node,
        expert_parallel_size=config.parallel.expert_parallel_size,
        zero_stage=config.parallel.zero_stage,
        micro_batch_size=config.micro_batch_size,
        num_micro=config.batch_size // (config.micro_batch_size * config.num_gpus),
        seq_len=config.seq_len,
        dtype=config.precision,
        activation_checkpointing=config.activation_checkpointing,
        bf16_parameters=config.parallel.bf16_parameters,
        offload_optimizer=config.parallel.offload_optimizer,
    )
