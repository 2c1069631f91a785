"""The plan of a training run, as the lines that --dry-run and launch/plan.py print."""

from __future__ import annotations

from moe.config import TrainConfig
from moe.plan.advice import changes_that_fit, smallest, usable_bytes
from moe.plan.layout import Layout, layout_of
from moe.plan.memory import Memory, rank_memory
from moe.plan.times import step_mfu, step_time
from moe.plan.traffic import rank_traffic
from moe.plan_config import ClusterConfig

_NAME, _COLUMN = 46, 16
Row = tuple[str, ...]


def plan_lines(
    config: TrainConfig,
    *,
    world_size: int,
    gpus_per_node: int,
    cluster: ClusterConfig | None = None,
) -> list[str]:
    """Ranks and groups, memory, bytes and time of a configured run; nothing is allocated.

    cluster says what the GPUs can do; without one they are taken to be H100s. Raises ConfigError
    for a layout that cannot be.
    """
    layout = layout_of(config, world_size=world_size, gpus_per_node=gpus_per_node)
    return layout_lines(layout, cluster or ClusterConfig(gpus_per_node=gpus_per_node))


def cpu_plan_lines(
    config: TrainConfig, *, world_size: int, per_host: int, memory_bytes: int | None
) -> list[str]:
    """The same for ranks on CPUs: what they need, and whether a host of that memory has it.

    memory_bytes: of one host, which its per_host ranks share; None where it is not known.
    """
    layout = layout_of(config, world_size=world_size, gpus_per_node=per_host, is_cuda=False)
    memory = rank_memory(layout)
    needed = per_host * (memory.total + memory.host)
    lines = [*head_lines(layout, ClusterConfig(gpu="CPU")), ""]
    said = f"memory of a host: {in_words(needed)} for {per_host} process(es), and the programs'"
    if memory_bytes is None:
        return [*lines, said]
    verdict = "fits" if needed <= memory_bytes else "DOES NOT FIT"
    return [*lines, said, f"{verdict}: {needed / memory_bytes:.0%} of {in_words(memory_bytes)}"]


def layout_lines(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """The same for any layout, on any cluster."""
    sections = [
        head_lines(layout, cluster),
        memory_lines(layout, cluster),
        traffic_lines(layout),
        time_lines(layout, cluster),
    ]
    lines: list[str] = []
    for section in sections:
        lines += [*section, ""]
    return lines[:-1]


def head_lines(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """Model, ranks, groups, batch."""
    model = layout.model
    nodes = f"{layout.num_nodes} node{'s' if layout.num_nodes > 1 else ''}"
    lines = [
        f"plan: {model.name}, {model.num_parameters():,} parameters, "
        f"{model.num_parameters(active=True):,} active",
        _pair("ranks", f"0 to {layout.world_size - 1} on {nodes}, {cluster.gpu}"),
    ]
    if model.is_sparse:
        lines += _group_lines(layout)
    windows = layout.micro_batch_size * layout.num_micro * layout.world_size
    lines.append(
        _pair(
            "a step",
            f"{windows:,} windows of {layout.seq_len:,} = {layout.world_size} ranks x "
            f"{layout.num_micro} micro-batches of {layout.micro_batch_size}; "
            f"{layout.tokens_of_rank * layout.world_size:,} tokens",
        )
    )
    parameters = "bfloat16 parameters, float32 masters"
    lines.append(
        _pair(
            "engine",
            f"ZeRO {layout.zero_stage}, {layout.dtype} products, "
            f"{parameters if layout.bf16_parameters else 'float32 parameters'}"
            f"{', optimiser on the CPU' if layout.offload_optimizer else ''}"
            f"{', layers recomputed' if layout.activation_checkpointing else ''}"
            f"{', experts recomputed' if layout.experts.recompute else ''}",
        )
    )
    return lines


def _group_lines(layout: Layout) -> list[str]:
    size, world = layout.expert_parallel_size, layout.world_size
    held = layout.model.num_experts // size
    here = layout.neighbours(layout.expert_group(0), 0)
    place = "inside a node" if here == size else f"{here} of {size} ranks on a node"
    groups = [f"{_ranks(layout.expert_group(rank))}" for rank in range(0, world, size)]
    owners = [f"{_ranks(layout.expert_data_group(rank))}" for rank in range(size)]
    if size == 1:
        return [_pair("experts", f"every rank holds all {held}; no row leaves its rank")]
    return [
        _pair(
            f"{len(groups)} expert groups",
            f"{_shortened(groups)}; {place}, {held} expert{'s' if held > 1 else ''} each",
        ),
        _pair(f"{len(owners)} data groups", f"{_shortened(owners)}; the same experts"),
    ]


def _ranks(ranks: range) -> str:
    if len(ranks) == 1:
        return str(ranks[0])
    if ranks.step == 1:
        return f"{ranks[0]}-{ranks[-1]}"
    shown = [str(rank) for rank in ranks]
    return ",".join(shown if len(shown) <= 4 else [*shown[:2], "...", shown[-1]])


def _shortened(groups: list[str]) -> str:
    return " | ".join(groups if len(groups) <= 4 else [*groups[:2], "...", groups[-1]])


def memory_lines(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """Bytes of one rank, whether they fit, and what to change where they do not."""
    memory = rank_memory(layout)
    rows: list[Row] = [(kind, in_words(size)) for kind, size in memory.state.items()]
    rows += [
        (f"{moment}: gradients, activations", in_words(size))
        for moment, size in memory.moments.items()
    ]
    limit = usable_bytes(cluster)
    rows.append((f"all, when the {memory.fullest}", in_words(memory.total)))
    lines = table_lines("memory of one rank", ("bytes",), rows, num_sums=1)
    if memory.host:
        lines.append(f"on the CPU's side, for each rank: {in_words(memory.host)}")
    gpu = f"{in_words(limit)} that a GPU has free ({cluster.memory_gib:g} GiB, less " + (
        f"{cluster.reserved_gib:g} for CUDA and NCCL)"
    )
    if memory.total <= limit:
        return [*lines, f"fits: {memory.total / limit:.0%} of the {gpu}"]
    excess = f"DOES NOT FIT: {in_words(memory.total - limit)} more than the {gpu}"
    return [*lines, excess, *_advice_lines(layout, cluster, memory)]


def _advice_lines(layout: Layout, cluster: ClusterConfig, memory: Memory) -> list[str]:
    parts = {**memory.state, memory.fullest: memory.moments[memory.fullest]}
    largest = max(parts, key=lambda part: parts[part])
    lines = [f"the largest part: {largest}, {in_words(parts[largest])}"]
    found = changes_that_fit(layout, cluster)
    if not found:
        least = smallest(layout, cluster)
        return [
            *lines,
            f"no layout of these {layout.world_size} GPUs fits; the smallest, "
            f"{' '.join(least.keys)}, needs {in_words(least.num_bytes)}. Use more GPUs, or a "
            "smaller model or data.seq_len.",
        ]
    lines.append("what fits, fewest changes first:")
    lines += [
        f"  {' '.join(change.keys)}: {in_words(change.num_bytes)}, {change.seconds:.2f} s a step"
        for change in found
    ]
    return lines


def traffic_lines(layout: Layout) -> list[str]:
    """Bytes that one rank sends in a step."""
    table = rank_traffic(layout)
    rows: list[Row] = [
        (purpose, in_words(sent.inside), in_words(sent.between), f"{sent.num_calls:,}")
        for purpose, sent in table.items()
    ]
    inside = sum(sent.inside for sent in table.values())
    between = sum(sent.between for sent in table.values())
    calls = sum(sent.num_calls for sent in table.values())
    rows.append(("all", in_words(inside), in_words(between), f"{calls:,}"))
    heads = ("in the node", "between nodes", "calls")
    return table_lines("sent by one rank in a step", heads, rows, num_sums=1)


def time_lines(layout: Layout, cluster: ClusterConfig) -> list[str]:
    """Seconds of a step, tokens a second, MFU, and what they rest on."""
    time = step_time(layout, cluster)
    rows: list[Row] = [
        (part, f"{seconds * 1000:,.1f}", f"{seconds / time.seconds:.1%}")
        for part, seconds in time.parts.items()
    ]
    rows.append(("all", f"{time.seconds * 1000:,.1f}", "100.0%"))
    lines = table_lines("a step, predicted", ("ms", "share"), rows, num_sums=1)
    rate = time.tokens / time.seconds
    lines.append(
        f"{rate:,.0f} tokens/s, {rate / layout.world_size:,.0f} a GPU; "
        f"MFU {step_mfu(time, world_size=layout.world_size):.1%} of "
        f"{time.peak_flops / 1e12:,.0f} TFLOP/s"
    )
    if time.hidden:
        lines.append(f"beside the products: {time.hidden * 1000:,.1f} ms of ZeRO 3's exchanges")
    lines.append(
        f"rates {cluster.rates} ({cluster.name}): products {cluster.dense_fraction:.0%}, experts "
        f"{cluster.experts_fraction:.0%}, attention {cluster.attention_fraction:.0%} of the peak; "
        f"{cluster.node_gb_per_second * cluster.node_fraction:,.0f} GB/s in a node, "
        f"{cluster.network_gb_per_second * cluster.network_fraction:,.0f} between nodes"
    )
    lines.append(
        "not in it: latencies, waiting for the slowest rank, uneven routing, loading data, saving"
    )
    return lines


def _pair(name: str, value: str) -> str:
    return f"{name:<20}{value}"


def table_lines(title: str, heads: Row, rows: list[Row], *, num_sums: int) -> list[str]:
    """Title with the columns' names, a rule, the rows, and a rule above the last num_sums."""
    rule = "-" * (_NAME + _COLUMN * len(heads))
    lines = [f"{title:<{_NAME}}" + "".join(f"{head:>{_COLUMN}}" for head in heads), rule]
    for number, row in enumerate(rows):
        if number == len(rows) - num_sums:
            lines.append(rule)
        lines.append(f"{row[0]:<{_NAME}}" + "".join(f"{cell:>{_COLUMN}}" for cell in row[1:]))
    return lines


def in_words(num_bytes: int) -> str:
    """Bytes in units of 1,024: 83.75 GiB."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"
