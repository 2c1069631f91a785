"""launch/tables.py: no two rows of one table have the same name."""

from __future__ import annotations

from tables import corpus_table, validation_table

from moe.data.manifest import DomainCount, FileEntry, Manifest, SplitEntry


def test_a_domain_named_all_is_told_apart_from_the_sum() -> None:
    entry = FileEntry("x", 1, "0")
    split = SplitEntry("train", (entry,), entry, 3, 30, 60, (DomainCount("all", 3, 30, 60),))
    manifest = Manifest(
        1, 0, "uint16", 512, 1, 500, ("all",), entry, (split,), ("x",), (), "{}", "0"
    )
    names = [line[:24] for line in corpus_table(manifest)]
    assert len(names) == len(set(names)) == 3
    record = {
        f"validation/{key}": 1.0
        for key in (
            "loss/all", "bits_per_byte/all", "loss", "bits_per_byte", "unigram_entropy",
            "unigram_bits_per_byte", "perplexity",
        )
    }  # fmt: skip
    names = [line[:16].strip() for line in validation_table(record)]
    assert len(names) == len(set(names))
