"""How long a step takes on a cluster of given rates, and the model FLOPs utilisation of that.

The prediction is a sum of parts that are limited by one thing each; a part overlaps another only
where the engine overlaps them, which is ZeRO 3's gathers and reductions with the products. Waiting
for the slowest rank, latencies, data loading and saving are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.model_flops import forward_flops_per_token
from moe.plan.activations import kept_activations, without_checkpointing
from moe.plan.held import held_groups, num_held, partition_elements
from moe.plan.layout import Layout
from moe.plan.traffic import Sent, rank_traffic
from moe.plan_config import ClusterConfig

_GIGA = 1e9
_TERA = 1e12
# A kept number is written and read in the forward pass, read in the backward pass, and its
# gradient written: an assumption that counts each element-wise operation once
_PASSES_OVER_KEPT = 4


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimiser step, by what limits them."""

    parts: dict[str, float]
    hidden: float  # of communication that runs beside products
    tokens: int  # over all ranks
    flops_per_token: float  # of training: model FLOPs, without recomputation
    peak_flops: float  # of one GPU

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step_time(layout: Layout, cluster: ClusterConfig) -> StepTime:
    """Predict a step: see this file's head, and the fields of ClusterConfig for the rates."""
    products = _products(layout, cluster)
    traffic = rank_traffic(layout)
    overlapped = _seconds_sent([sent for sent in traffic.values() if sent.overlaps], cluster)
    alone = {
        purpose: _seconds_sent([sent], cluster)
        for purpose, sent in traffic.items()
        if not sent.overlaps
    }
    compute = sum(products.values())
    parts = dict(products)
    parts["norms, activations, other passes over memory"] = _passes(layout, cluster)
    parts["optimiser"] = _optimiser(layout, cluster)
    for name, purposes in _COMMUNICATION.items():
        parts[name] = sum(alone.get(purpose, 0.0) for purpose in purposes)
    parts["ZeRO 3, beyond what the products hide"] = max(0.0, overlapped - compute)
    forward = forward_flops_per_token(layout.model, layout.seq_len)
    return StepTime(
        parts={name: seconds for name, seconds in parts.items() if seconds},
        hidden=min(overlapped, compute),
        tokens=layout.tokens_of_rank * layout.world_size,
        flops_per_token=3.0 * sum(forward.values()),
        peak_flops=_peak(layout, cluster),
    )


_COMMUNICATION = {
    "expert exchange": ("expert rows", "expert counts"),
    "gradients and parameters": (
        "gradients, shared",
        "gradients, experts",
        "updated parameters",
    ),
    "statistics": ("balance statistics", "numbers of the step"),
}


def step_mfu(time: StepTime, *, world_size: int) -> float:
    """Useful FLOP/s over the peak of all GPUs."""
    return time.tokens * time.flops_per_token / (time.seconds * world_size * time.peak_flops)


def implied_mfu(
    flops_per_token: float, *, tokens: float, days: float, num_gpus: int, peak_flops: float
) -> float:
    """The MFU of a run of which only its tokens, days and GPUs are known."""
    return tokens * flops_per_token / (days * 86_400 * num_gpus * peak_flops)


def _peak(layout: Layout, cluster: ClusterConfig) -> float:
    is_bfloat16 = layout.dtype == "bfloat16"
    return _TERA * (cluster.peak_tflops if is_bfloat16 else cluster.peak_tflops_float32)


def _products(layout: Layout, cluster: ClusterConfig) -> dict[str, float]:
    """Seconds of matrix products: 3 times the forward's, 4 where it runs twice (not the head);
    experts.recompute makes gate and up, two of the three forward products, once more."""
    per_token = forward_flops_per_token(layout.model, layout.seq_len)
    again = 1 if layout.activation_checkpointing else 0
    peak, tokens = _peak(layout, cluster), layout.tokens_of_rank
    seconds: dict[str, float] = {}
    for part, flops in per_token.items():
        name, fraction = {
            "experts": ("experts' products", cluster.experts_fraction),
            "scores": ("attention's scores", cluster.attention_fraction),
        }.get(part, ("projections, router, head", cluster.dense_fraction))
        times = 3.0 + (0 if part == "head" else again)
        if part == "experts" and layout.experts.recompute:
            times += 2 / 3
        seconds[name] = seconds.get(name, 0.0) + times * flops * tokens / (peak * fraction)
    return seconds


def _passes(layout: Layout, cluster: ClusterConfig) -> float:
    kept = kept_activations(without_checkpointing(layout))
    size = sum(size for part, size in kept.items() if not part.startswith("weights in "))
    passes = _PASSES_OVER_KEPT + (2 if layout.activation_checkpointing else 0)
    copies = sum(size for part, size in kept.items() if part.startswith("weights in "))
    copies = 3 * copies  # a float32 weight is read and its copy of half the size written
    rate = _GIGA * cluster.memory_gb_per_second * cluster.memory_fraction
    return layout.num_micro * (passes * size + copies) / rate


def _optimiser(layout: Layout, cluster: ClusterConfig) -> float:
    """Masters and moments are read and written, gradients read: 28 bytes an element of this rank's
    part; the norm and clipping read and write all gradients once more."""
    parts = sum(partition_elements(layout, group) for group in held_groups(layout))
    rate = _GIGA * cluster.memory_gb_per_second * cluster.memory_fraction
    gradients = 3 * layout.gradient_bytes * (num_held(layout) if layout.zero_stage < 2 else parts)
    seconds = gradients / rate
    if not layout.offload_optimizer:
        return seconds + 28 * parts / rate
    # gradients go to the host and parameters come back; the CPU's own passes at the same rate
    return seconds + (4 + layout.parameter_bytes + 28) * parts / (
        _GIGA * cluster.host_gb_per_second
    )


def _seconds_sent(parts: list[Sent], cluster: ClusterConfig) -> float:
    inside = sum(sent.inside for sent in parts)
    between = sum(sent.between for sent in parts)
    # a GPU's NVLink and its network card send at the same time
    return max(
        inside / (_GIGA * cluster.node_gb_per_second * cluster.node_fraction),
        between / (_GIGA * cluster.network_gb_per_second * cluster.network_fraction),
    )
