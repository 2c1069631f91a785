"""Turn text into token shards: python launch/prepare_data.py data.sources=[my_texts] data.name=mine."""

from __future__ import annotations

from command import run_command

from moe.config import PrepareConfig


def prepare_data(config: PrepareConfig) -> None:
    """Prepare, show progress, and print what was made."""
    from moe.data.prepare import prepare
    from moe.train.progress import progress_bar

    with progress_bar("prepare") as on_progress:
        manifest = prepare(config, on_progress=on_progress)
    print(manifest.summary())
    print(f"data: {config.paths.data_dir}")


if __name__ == "__main__":
    run_command("prepare_data", PrepareConfig, prepare_data)
