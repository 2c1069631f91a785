"""What the command plan can be told: a cluster that need not be there, and a goal.

The rules of moe/config.py hold here too. Rates are per GPU and one direction; each cluster says
whether they were measured on it or are assumed, and where the numbers are from.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config import ExpertsConfig, ParallelConfig, RouterConfig
from moe.config_checks import check_at_least, check_one_of, check_positive
from moe.errors import ConfigError
from moe.model_config import ModelConfig

EVIDENCE_NAMES = ("assumed", "measured")
PLAN_PRECISION_NAMES = ("bfloat16", "float32")


@dataclass(frozen=True)
class ClusterConfig:
    """One kind of GPU and the links between them; defaults are H100 SXM 80 GB, eight a node."""

    name: str = "h100x8"
    gpu: str = "H100 SXM 80 GB"
    gpus_per_node: int = 8
    memory_gib: float = 79.1  # as torch reports an 80 GB card
    reserved_gib: float = 4.0  # CUDA context, NCCL's channels, fragmentation
    peak_tflops: float = 989.4  # bfloat16, dense; the data sheet's
    peak_tflops_float32: float = 66.9  # without TF32
    dense_fraction: float = 0.70  # of the peak, that projections and the head reach
    experts_fraction: float = 0.55  # the grouped products of the experts
    # a mask keeps documents apart, so torch takes its memory-efficient kernel, which works on both
    # halves of the causal square; the useful half is counted
    attention_fraction: float = 0.15
    memory_gb_per_second: float = 3350.0
    memory_fraction: float = 0.80
    node_gb_per_second: float = 450.0  # NVLink, sent by a GPU to those of its node
    node_fraction: float = 0.75
    network_gb_per_second: float = 50.0  # 400 Gb/s a GPU
    network_fraction: float = 0.80
    host_gb_per_second: float = 55.0  # to the CPU's memory, for an offloaded optimiser
    rates: str = "assumed"  # or "measured": whether the fractions were measured with this code
    source: str = (
        "peaks and links: data sheets; fractions: guesses below what is published for this GPU "
        "(SonicMoE 0.60 of the peak, arXiv 2512.14080; FlashAttention 2 0.35, arXiv 2407.08608)"
    )

    def __post_init__(self) -> None:
        check_at_least("cluster.gpus_per_node", self.gpus_per_node, 1)
        check_at_least("cluster.reserved_gib", self.reserved_gib, 0.0)
        check_one_of("cluster.rates", self.rates, EVIDENCE_NAMES)
        for name in (
            "memory_gib", "peak_tflops", "peak_tflops_float32", "memory_gb_per_second",
            "node_gb_per_second", "network_gb_per_second", "host_gb_per_second",
        ):  # fmt: skip
            check_positive(f"cluster.{name}", getattr(self, name))
        for name in ("dense", "experts", "attention", "memory", "node", "network"):
            value = getattr(self, f"{name}_fraction")
            if not 0.0 < value <= 1.0:
                raise ConfigError(
                    f"cluster.{name}_fraction: got {value}; it must be above 0 and at most 1 "
                    "(the whole peak)."
                )
        if self.reserved_gib >= self.memory_gib:
            raise ConfigError(
                f"cluster.reserved_gib: got {self.reserved_gib}; it must be below "
                f"cluster.memory_gib={self.memory_gib}."
            )


@dataclass(frozen=True)
class PlanConfig:
    """launch/plan.py: a training run on a cluster, and the time it is to take."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    num_gpus: int = 8
    seq_len: int = 4096
    batch_size: int = 1024  # windows of an optimiser step, over all GPUs
    micro_batch_size: int = 1
    precision: str = "bfloat16"
    activation_checkpointing: bool = False
    tokens: float = 0.0  # of the whole run; 0: its length is not asked for
    days: float = 0.0  # that somebody says the whole run took, to compare with; 0: nobody

    def __post_init__(self) -> None:
        for name in ("num_gpus", "seq_len", "batch_size", "micro_batch_size"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("tokens", self.tokens, 0.0)
        check_at_least("days", self.days, 0.0)
        check_one_of("precision", self.precision, PLAN_PRECISION_NAMES)
        if self.days and not self.tokens:
            raise ConfigError(
                f"days: got {self.days} without tokens; a rate needs both. Add tokens=4.9e12."
            )
        per_round = self.micro_batch_size * self.num_gpus
        if self.batch_size % per_round:
            raise ConfigError(
                f"batch_size: got {self.batch_size}; it must be a multiple of "
                f"micro_batch_size={self.micro_batch_size} times num_gpus={self.num_gpus}. "
                f"Set batch_size={-(-self.batch_size // per_round) * per_round}."
            )
