"""Train: python launch/train.py [experiment=...] [key=value ...]; --help lists the groups."""

from __future__ import annotations

from command import run_command

from moe.config import TrainConfig


def train(config: TrainConfig) -> None:
    """Train, then show the numbers, a sample and a picture of the run."""
    from moe.train.run import run

    summary = run(config, say=lambda line: print(line, flush=True))
    if not summary.is_first:
        return
    from analysis.plots import run_picture

    picture = summary.run_dir / "run.png"
    run_picture(summary.metrics, title=config.name, path=picture)
    if summary.sample:
        print(f"\nsample:\n{summary.sample}\n")
    for line in validation_table(summary.metrics):
        print(line)
    print(f"picture: {picture}\nrun folder: {summary.run_dir}")


def validation_table(metrics: list[dict]) -> list[str]:
    """The last validation record as lines: every domain's loss and bits per byte, and the total."""
    records = [record for record in metrics if record.get("kind") == "validation"]
    if not records:
        return []
    last, prefix = records[-1], "validation/bits_per_byte/"
    lines = [f"{'held-out text':<16}{'nats/token':>12}{'bits/byte':>12}"]
    for key in sorted(key for key in last if key.startswith(prefix)):
        domain = key.removeprefix(prefix)
        lines.append(f"{domain:<16}{last[f'validation/loss/{domain}']:>12.4f}{last[key]:>12.4f}")
    loss, unigram = last["validation/loss"], last["validation/unigram_entropy"]
    lines.append(f"{'all':<16}{loss:>12.4f}{last['validation/bits_per_byte']:>12.4f}")
    lines.append(
        f"{'unigram entropy':<16}{unigram:>12.4f}{last['validation/unigram_bits_per_byte']:>12.4f}"
    )
    lines.append(
        f"the loss is {1 - loss / unigram:.1%} below the unigram entropy of the same tokens"
    )
    return lines


if __name__ == "__main__":
    run_command("train", TrainConfig, train)
