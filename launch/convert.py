"""Convert published checkpoints of the Phi-3 family to models of ours, and ours to published ones.

usage: python launch/convert.py source=FOLDER target=FOLDER [key=value ...]

examples:
  python launch/convert.py source=Phi-3.5-MoE-instruct target=models/phi35_moe
  python launch/convert.py source=runs/nano/2026-01-31_12-00-00 target=exported/nano
  python launch/convert.py source=Phi-3-small-8k target=models/small tokenizer=cl100k_base.tiktoken
The source decides the direction: a Hugging Face folder (config.json, *.safetensors in one file or
in shards) becomes a model that generate.py and evaluate.py open and train.py starts from
(train.init_from); a run, a checkpoint or a converted model becomes a folder that transformers
opens. Everything is checked before anything is written, and memory does not grow with the model.
window=original reads config.json's sliding_window as the released code does (one key more than the
number), window=transformers as transformers 4.57 and 5 do.
"""

from __future__ import annotations

import sys
from pathlib import Path

from command import run_command

from moe.convert.hf_folder import is_hf_folder
from moe.convert_config import ConvertConfig
from moe.errors import ConfigError
from moe.run_folder import find_run, is_run


def convert(config: ConvertConfig) -> None:
    """Convert in the direction that the source asks for, and say what was written."""
    source, target = _folders(config)
    if is_run(source):
        _export(config, target)
    elif is_hf_folder(source):
        _import(config, source, target)
    else:
        raise ConfigError(
            f"source: {config.source!r} is no model; allowed: a folder with config.json and "
            "*.safetensors, or a run, a checkpoint or a converted model of ours."
        )


def _folders(config: ConvertConfig) -> tuple[Path, Path]:
    for key in ("source", "target"):
        if not getattr(config, key):
            raise ConfigError(
                f"{key}: not given. Write: python launch/convert.py source=FOLDER target=FOLDER."
            )
    source, target = Path(config.source).expanduser(), Path(config.target).expanduser()
    if not source.is_dir():
        what = "is a file" if source.exists() else "does not exist"
        raise ConfigError(
            f"source: {config.source!r} {what} (working directory {Path.cwd()}); give a folder "
            "with a model."
        )
    return source, target


def _import(config: ConvertConfig, source: Path, target: Path) -> None:
    from moe.convert.import_model import import_model
    from moe.train.progress import progress_bar

    tokenizer = Path(config.tokenizer).expanduser() if config.tokenizer else None
    with progress_bar("convert") as on_progress:
        done = import_model(
            source,
            target,
            window=config.window or "original",
            tokenizer=tokenizer,
            on_progress=on_progress,
        )
    model = done.found.model
    total, active = model.num_parameters(), model.num_parameters(active=True)
    print(f"model: {done.found.family}, {total:,} parameters, {active:,} active, {done.precision}")
    if model.sliding_window is not None and model.sliding_window < model.usable_length:
        _notice(_window_reading(model.sliding_window, config.window or "original"))
    if done.skipped:
        _notice(f"{len(done.skipped)} rotary buffer(s) are left out: config.json says the same.")
    for note in done.notes:
        _notice(note)
    print(f"written: {target}, {done.num_bytes:,} bytes of tensors")
    print(f"use it: python launch/generate.py run={target} prompt=TEXT")


def _export(config: ConvertConfig, target: Path) -> None:
    if config.tokenizer is not None:
        raise ConfigError(
            f"tokenizer: got {config.tokenizer!r}, and the source is a model of ours, which has "
            "its own; allowed when a Hugging Face folder is converted. Leave it out."
        )
    find_run(config.source)
    from moe.convert.export_model import export_model
    from moe.load_run import open_run
    from moe.train.progress import progress_bar

    opened = open_run(config.source, on_skip=_notice)
    with progress_bar("convert") as on_progress:
        done = export_model(
            opened,
            target,
            window=config.window,
            max_shard_bytes=config.max_shard_bytes,
            on_progress=on_progress,
        )
    print(f"checkpoint: {opened.checkpoint.folder}, step {opened.checkpoint.step}")
    if done.family == "phi3small":
        _notice("transformers has no class for phi3small: its publisher's code opens the folder.")
    if not done.has_tokenizer:
        _notice("the model has no tokenizer, so the folder has none; add the published one.")
    shards = "one file" if done.num_shards == 1 else f"{done.num_shards} shards"
    print(f"written: {target}, {done.family}, {done.num_bytes:,} bytes of {done.dtype} in {shards}")


def _window_reading(num_keys: int, window: str) -> str:
    said = f"sliding_window: a query sees {num_keys:,} keys, itself included, as "
    if window == "original":
        other = "transformers 4.57 and 5 show one less (window=transformers)."
        return f"{said}in the released code; {other}"
    return f"{said}in transformers 4.57 and 5; the released code shows one more (window=original)."


def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(
        "convert",
        ConvertConfig,
        convert,
        about=__doc__,
        writes="target",
        literal=("source", "target", "tokenizer"),
    )
