"""The text of a comparison's report: a function of runs.csv and of what was asked, nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from analysis.compare_runs import (
    LEVEL,
    Difference,
    Mean,
    Row,
    by_seed,
    column_mean,
    difference,
    domains,
    mean_over_seeds,
    spread,
    student_quantile,
)
from moe.compare_config import CompareConfig, ContrastConfig

FIGURE_NAME = "figure.png"
_FOUND = {
    "seen": "**Seen at this scale.**",
    "opposite": "**The opposite is seen at this scale.**",
    "not resolved": "**Not resolved.**",
    "lower": "**A difference is seen at this scale.**",
    "higher": "**A difference is seen at this scale.**",
}


def report(config: CompareConfig, rows: Sequence[Row]) -> str:
    """Markdown; DataError where an arm of a contrast has no runs."""
    pairs = [(c, difference(rows, c.arm, against=c.against)) for c in config.contrasts]
    parts = [
        f"# {config.title}",
        f"**Question.** {config.question.strip()}",
        f"**Published.** {config.published.strip()} Source: {config.source}.",
        "## What these runs say",
        "\n".join(f"- {conclusion(config, contrast, found)}" for contrast, found in pairs),
        f"![Learning curves, losses and differences]({FIGURE_NAME})",
        "## Numbers",
        _table(*_filled(["", *_HEADER], [_arm_cells(config, rows, a.name) for a in config.arms])),
        _below_table(rows),
    ]
    if domains(rows):
        parts += ["Loss by domain, nats per token:", _domain_table(config, rows)]
    parts += [
        "## Differences, seed by seed",
        _difference_table(config, pairs),
        _about_intervals(pairs),
        "## How it was made",
        _provenance(config, rows),
        "## What limits it",
        "\n".join(f"- {limit.strip()}" for limit in [*config.limits, *_limits(config, rows)]),
    ]
    return "\n\n".join(parts) + "\n"


def conclusion(config: CompareConfig, contrast: ContrastConfig, found: Difference) -> str:
    """One contrast in a sentence, as weak as its interval."""
    arm, against = label(config, contrast.arm), label(config, contrast.against)
    verdict, mean = found.verdict(contrast.expects), found.mean
    expected = ""
    if contrast.expects != "unknown":
        expected = f" (published direction: {contrast.expects})"
    head = f"{arm} against {against}{expected}: {_FOUND[verdict]}"
    if mean.num_seeds == 1:
        return f"{head} One seed gives a difference of {mean.mean:+.4f} and no interval."
    interval = (
        f"95 % interval of the difference {mean.low:+.4f} to {mean.high:+.4f}, "
        f"{mean.num_seeds} seeds"
    )
    if verdict == "not resolved":
        return (
            f"{head} The mean difference is {mean.mean:+.4f} nats per token, and its interval "
            f"holds 0 ({interval}); with this spread a difference below about "
            f"{mean.half_width:.4f} cannot be told from none."
        )
    word = "lower" if mean.mean < 0 else "higher"
    return f"{head} The loss is {word} by {abs(mean.mean):.4f} nats per token ({interval})."


def label(config: CompareConfig, name: str) -> str:
    """How an arm is called."""
    return config.arm(name).label or name


_HEADER = [
    "validation loss, nats per token", "bits per byte", "load CV", "dead experts", "parameters",
    "active", "tokens", "FLOPs", "seconds",
]  # fmt: skip


def _arm_cells(config: CompareConfig, rows: Sequence[Row], name: str) -> list[str]:
    loss = mean_over_seeds(list(by_seed(rows, name, "validation_loss").values()) or [math.nan])
    bits = mean_over_seeds(list(by_seed(rows, name, "bits_per_byte").values()) or [math.nan])
    dead = column_mean(rows, name, "dead_experts")
    return [
        label(config, name),
        _with_interval(loss),
        _with_interval(bits),
        _number(column_mean(rows, name, "load_cv"), ".2f"),
        _number(dead, ".1f"),
        _count(column_mean(rows, name, "parameters")),
        _count(column_mean(rows, name, "active_parameters")),
        _count(column_mean(rows, name, "total_tokens")),
        _number(column_mean(rows, name, "total_flops"), ".3g"),
        _number(column_mean(rows, name, "training_seconds"), ".0f"),
    ]


def _below_table(rows: Sequence[Row]) -> str:
    seeds = sorted({int(row["seed"]) for row in rows})
    entropy, tokens = spread(rows, "unigram_entropy")[0], rows[0]["validation_tokens"]
    head = f"Seed {seeds[0]} alone, so without intervals."
    if len(seeds) > 1:
        head = f"Means over seeds {', '.join(map(str, seeds))} ± half of the {LEVEL:.0%} interval."
    load = ""
    if any(row.get("load_cv") for row in rows):
        load = (
            "Load CV is the deviation of the experts' load over its mean, averaged over layers, in "
            "the last 20 steps; dead experts had no token in them. "
        )
    return (
        f"{head} All arms are measured on the same {int(tokens):,} held-out tokens, whose unigram "
        f"entropy is {entropy:.3f} nats. {load}Tokens and FLOPs include those of the run that an "
        "arm starts from; seconds are its own training steps on one thread, beside other work, so "
        "no measure of speed."
    )


def _domain_table(config: CompareConfig, rows: Sequence[Row]) -> str:
    names = domains(rows)
    body = [
        [label(config, arm.name)]
        + [_number(column_mean(rows, arm.name, f"loss/{name}"), ".4f") for name in names]
        for arm in config.arms
    ]
    return _table(["", *names], body)


def _difference_table(
    config: CompareConfig, pairs: Sequence[tuple[ContrastConfig, Difference]]
) -> str:
    seeds = sorted({seed for _, found in pairs for seed in found.by_seed})
    body = []
    for contrast, found in pairs:
        mean = found.mean
        body.append(
            [f"{label(config, contrast.arm)} against {label(config, contrast.against)}"]
            + [_number(found.by_seed.get(seed, math.nan), "+.4f") for seed in seeds]
            + [f"{mean.mean:+.4f}", _range(mean), _number(found.pairing, ".2f")]
            + [contrast.expects if contrast.expects != "unknown" else ""]
            + [found.verdict(contrast.expects)]
        )
    header = ["", *(f"seed {seed}" for seed in seeds), "mean", "95 % interval", "pairing"]
    return _table([*header, "published", "found"], body)


def _about_intervals(pairs: Sequence[tuple[ContrastConfig, Difference]]) -> str:
    numbers = sorted({found.mean.num_seeds for _, found in pairs})
    widths = [
        f"with {n} seeds it is the mean ± {student_quantile(0.975, n - 1) / math.sqrt(n):.2f} "
        "standard deviations"
        for n in numbers
        if n > 1
    ]
    wide = f" ({'; '.join(widths)})" if widths else ""
    chance = f"{len(pairs)} intervals are shown and none is widened for that: each"
    return (
        "Validation loss of the first arm less that of the second, in nats per token; below 0 the "
        "first is better. Runs of one seed read the same text in the same order, so differences "
        "are taken within a seed; pairing is the deviation of the differences over what it would "
        "be had the seeds nothing in common, and below 1 says that this helped. The interval is "
        f"Student's t over seeds{wide}. {chance if len(pairs) > 1 else 'It'} misses its true value "
        "in one case of twenty."
    )


def _provenance(config: CompareConfig, rows: Sequence[Row]) -> str:
    commits = sorted({commit for row in rows for commit in row.get("commit", "").split()})
    machines = sorted(
        {f"{r.get('cpu')}, {r.get('cores')} cores, torch {r.get('torch')}" for r in rows}
    )
    changed = (
        " (a `+` marks a tree with changes that were not committed)"
        if any(commit.endswith("+") for commit in commits)
        else ""
    )
    seconds = sum(float(row["training_seconds"]) for row in rows if row.get("training_seconds"))
    common = {row["common_overrides"] for row in rows if row.get("common_overrides")}
    seeds = sorted({int(row["seed"]) for row in rows})
    options = "".join(f" overrides='{text}'" for text in sorted(common))
    if seeds != list(CompareConfig().seeds):
        options = f" seeds=[{','.join(map(str, seeds))}]{options}"
    return "\n".join(
        [
            f"- command: `python launch/compare.py comparison={config.name}{options}`; this text "
            "and the figure again from the CSV files: the same with `report_only=true`",
            f"- commit of the runs: {', '.join(commits) or 'unknown'}{changed}",
            f"- machine: {'; '.join(machines)}",
            f"- data: {', '.join(sorted({row.get('data', '') for row in rows}))} (fingerprint of "
            "the prepared text)",
            f"- {len(rows)} runs, {seconds / 3600:.1f} hours of one thread; raw numbers: "
            "[runs.csv](runs.csv), [curves.csv](curves.csv)",
        ]
    )


def _limits(config: CompareConfig, rows: Sequence[Row]) -> list[str]:
    """What no small run can say, with this one's numbers."""
    ratios = [
        float(r["total_tokens"]) / float(r["parameters"]) for r in rows if r.get("parameters")
    ]
    limits = [
        f"{_between(min(ratios), max(ratios))} tokens a parameter, where about 20 is usual for a "
        "dense model (arXiv 2203.15556): all arms are at the beginning of their training, and an "
        "order seen here may turn later.",
        "One learning rate and one schedule for all arms, tuned for none of them. An arm that "
        "wants another one is shown worse than it is.",
        "The intervals speak of other seeds only: not of other held-out text, other corpora, other "
        "sizes.",
    ]
    skipped = sum(int(row["skipped_steps"]) for row in rows if row.get("skipped_steps"))
    if skipped:
        limits.append(f"{skipped} steps were skipped for a gradient that was not finite.")
    missing = [
        f"{label(config, arm.name)} has {len(by_seed(rows, arm.name, 'validation_loss'))}"
        for arm in config.arms
        if len(by_seed(rows, arm.name, "validation_loss")) < len(config.seeds)
    ]
    if missing:
        limits.append(f"Of {len(config.seeds)} seeds asked for, {', '.join(missing)}.")
    return limits


def _between(least: float, most: float) -> str:
    one, other = f"{least:.2g}", f"{most:.2g}"
    return f"About {one}" if one == other else f"Between {one} and {other}"


def _filled(
    header: Sequence[str], body: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Without the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(cells[i] for cells in body)]
    return [header[i] for i in kept], [[cells[i] for i in kept] for cells in body]


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *body])


def _with_interval(mean: Mean) -> str:
    if math.isnan(mean.mean):
        return ""
    return f"{mean.mean:.4f}" + ("" if mean.num_seeds == 1 else f" ± {mean.half_width:.4f}")


def _range(mean: Mean) -> str:
    return "" if mean.num_seeds == 1 else f"{mean.low:+.4f} to {mean.high:+.4f}"


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _count(value: float) -> str:
    if math.isnan(value):
        return ""
    return f"{value / 1e6:.2f} M"
