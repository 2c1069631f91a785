"""How numbers are shown on the terminal: the tables that commands print, as lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe.data.manifest import Manifest

TOTAL = "all domains"  # a domain may be named "all"


def validation_table(record: dict[str, Any]) -> list[str]:
    """A record of moe.evaluate.evaluate as lines: every domain, the total, the unigram entropy."""
    prefix = "validation/bits_per_byte/"
    lines = [f"{'held-out text':<16}{'nats/token':>12}{'bits/byte':>12}"]
    for key in sorted(key for key in record if key.startswith(prefix)):
        domain = key.removeprefix(prefix)
        lines.append(
            f"{domain:<16}{record[f'validation/loss/{domain}']:>12.4f}{record[key]:>12.4f}"
        )
    loss, unigram = record["validation/loss"], record["validation/unigram_entropy"]
    lines.append(f"{TOTAL:<16}{loss:>12.4f}{record['validation/bits_per_byte']:>12.4f}")
    lines.append(
        f"{'unigram entropy':<16}{unigram:>12.4f}"
        f"{record['validation/unigram_bits_per_byte']:>12.4f}"
    )
    lines.append(f"perplexity {record['validation/perplexity']:,.2f}{_distance(loss, unigram)}")
    return lines


def _distance(loss: float, unigram: float) -> str:
    if unigram == 0:  # a text of one token, over and over
        return ""
    side = "below" if loss <= unigram else "above"
    share = abs(1 - loss / unigram)
    return f"; the loss is {share:.1%} {side} the unigram entropy of the same tokens"


def load_line(metrics: list[dict[str, Any]], *, num_records: int = 20) -> list[str]:
    """How evenly the experts were used over the last records; nothing for a dense model."""
    import numpy as np

    from analysis.utilisation import load_ratio

    records = [record for record in metrics if record.get("router/load_LE")][-num_records:]
    if not records:
        return []
    ratio_LE = load_ratio(np.mean([record["router/load_LE"] for record in records], axis=0))
    used = int((ratio_LE > 0).sum())
    return [
        f"experts: {used} of {ratio_LE.size} received tokens in the last {len(records)} steps; "
        f"the busiest {ratio_LE.max():.2f}, the idlest {ratio_LE.min():.2f} times an equal share"
    ]


def corpus_table(manifest: Manifest) -> list[str]:
    """Documents, tokens and bytes of each split and domain, as lines."""
    lines = [f"{'split':<12}{'domain':<12}{'documents':>10}{'tokens':>14}{'bytes':>14}"]
    for split in manifest.splits:
        rows = [(d.name, d.num_documents, d.num_tokens, d.num_bytes) for d in split.domains]
        rows.append((TOTAL, split.num_documents, split.num_tokens, split.num_bytes))
        lines += [
            f"{split.name:<12}{name:<12}{documents:>10,}{tokens:>14,}{size:>14,}"
            for name, documents, tokens, size in rows
        ]
    for skip in manifest.skipped:
        more = ", ..." if 0 < len(skip.examples) < skip.count else ""
        names = f": {', '.join(skip.examples)}{more}" if skip.examples else ""
        lines.append(f"left out: {skip.count:,} ({skip.reason}){names}")
    return lines
