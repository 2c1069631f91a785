"""Turn text into token shards that training reads; the tokenizer is trained from the same text.

usage: python launch/prepare_data.py [group=option ...] [key=value ...]

examples:
  python launch/prepare_data.py
  python launch/prepare_data.py data=files data.name=mine 'data.sources=[texts,notes.jsonl]'
  python launch/prepare_data.py data.max_bytes=2000000 tokenizer.vocab_size=1024 data.name=small
Train on it with the same data.name and tokenizer: python launch/train.py data.name=mine
"""

from __future__ import annotations

from command import run_command
from tables import corpus_table

from moe.config import PrepareConfig


def prepare_data(config: PrepareConfig) -> None:
    """Prepare, show progress, and print what was made."""
    from moe.data.prepare import prepare
    from moe.train.progress import progress_bar

    with progress_bar("prepare") as on_progress:
        manifest = prepare(config, on_progress=on_progress)
    for line in corpus_table(manifest):
        print(line)
    print(f"data: {config.paths.data_dir}")


if __name__ == "__main__":
    run_command("prepare_data", PrepareConfig, prepare_data, about=__doc__, writes="paths.data_dir")
