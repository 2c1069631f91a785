"""Turn text into token shards: python launch/prepare_data.py data.name=mine data.sources=[texts]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from command import run_command

from moe.config import PrepareConfig

if TYPE_CHECKING:
    from moe.data.manifest import Manifest


def prepare_data(config: PrepareConfig) -> None:
    """Prepare, show progress, and print what was made."""
    from moe.data.prepare import prepare
    from moe.train.progress import progress_bar

    with progress_bar("prepare") as on_progress:
        manifest = prepare(config, on_progress=on_progress)
    for line in corpus_table(manifest):
        print(line)
    print(f"data: {config.paths.data_dir}")


def corpus_table(manifest: Manifest) -> list[str]:
    """Documents, tokens and bytes of each split and domain, as lines."""
    lines = [f"{'split':<12}{'domain':<12}{'documents':>10}{'tokens':>14}{'bytes':>14}"]
    for split in manifest.splits:
        rows = [(d.name, d.num_documents, d.num_tokens, d.num_bytes) for d in split.domains]
        rows.append(("all", split.num_documents, split.num_tokens, split.num_bytes))
        lines += [
            f"{split.name:<12}{name:<12}{documents:>10,}{tokens:>14,}{size:>14,}"
            for name, documents, tokens, size in rows
        ]
    lines += [f"left out: {skip.count:,} ({skip.reason})" for skip in manifest.skipped]
    return lines


if __name__ == "__main__":
    run_command("prepare_data", PrepareConfig, prepare_data)
