"""Print what a model needs: parameters, memory for a batch and length, operations of a token.

usage: python launch/inspect_model.py [model=NAME | run=FOLDER | config_json=PATH] [key=value ...]

examples:
  python launch/inspect_model.py model=phi35_moe batch_size=8 seq_len=4096
  python launch/inspect_model.py run=runs/nano/2026-01-31_12-00-00
  python launch/inspect_model.py config_json=Phi-3.5-mini/config.json seq_len=131072
  python launch/inspect_model.py config_json=PATH write_yaml=FOLDER/model/my_model.yaml
The last writes a model's shape, with the LongRoPE factors that only its own config.json has, for
training: python launch/train.py --config-dir FOLDER model=my_model. The formulas are in
moe/model_report.py and moe/model_flops.py. Nothing is allocated, so any size can be asked for.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from command import run_command

from moe.errors import ConfigError
from moe.inspect_config import InspectConfig


def inspect_model(config: InspectConfig) -> None:
    """Print the tables of one model; write its YAML file where write_yaml says so."""
    _refuse_two_models(config, sys.argv[1:])
    target = _yaml_target(config)
    config, source = _resolved(config)
    usable = config.model.usable_length
    if config.seq_len > usable:
        raise ConfigError(
            f"seq_len: got {config.seq_len}; the model takes at most {usable} (model.max_position, "
            "and model.rope.original_max_position while model.rope.long_factor is not given). Set "
            f"seq_len={usable} or less, or 0 for {min(usable, 4096)}."
        )
    from model_tables import model_tables  # torch behind it: only after the checks

    if target is not None:
        _write_yaml(config, target, source)
    seq_len = config.seq_len or min(usable, 4096)
    print(f"{config.model.name} ({source})")
    for line in model_tables(
        config.model,
        config.router,
        batch_size=config.batch_size,
        seq_len=seq_len,
        dtype=config.dtype,
    ):
        print(line)


def _resolved(config: InspectConfig) -> tuple[InspectConfig, str]:
    """The configuration with the model that is meant, and where it is from."""
    if config.config_json:
        from moe.convert.hf_config import load_hf_config

        found = load_hf_config(config.config_json, window=config.window)
        model = dataclasses.replace(found.model, name=config.name or found.model.name)
        source = f"{config.config_json}, family {found.family}"
        return dataclasses.replace(config, model=model, router=found.router), source
    if config.run:
        from moe.load_run import open_run

        opened = open_run(config.run, on_skip=lambda why: print(f"note: {why}", file=sys.stderr))
        known = opened.config
        source = f"{opened.checkpoint.folder}"
        return dataclasses.replace(config, model=known.model, router=known.router), source
    return config, "configuration"


def _refuse_two_models(config: InspectConfig, arguments: list[str]) -> None:
    for key in ("run", "config_json"):
        for argument in arguments:
            group = argument.lstrip("+~").partition("=")[0].partition(".")[0]
            if getattr(config, key) and group in ("model", "router"):
                raise ConfigError(
                    f"{argument.partition('=')[0]}: given with {key}={getattr(config, key)!r}, "
                    f"which has a {group} of its own; allowed: one of them. Remove the other."
                )


def _yaml_target(config: InspectConfig) -> Path | None:
    """The file to write; refused now where it cannot be, or already is."""
    if not config.write_yaml:
        return None
    path = Path(os.path.expanduser(config.write_yaml))  # leaves an unknown ~name as it is
    if path.suffix != ".yaml":
        raise ConfigError(
            f"write_yaml: got {config.write_yaml!r}; allowed: a file that ends in .yaml, e.g. "
            "write_yaml=my_conf/model/my_model.yaml."
        )
    if path.exists():
        raise ConfigError(
            f"write_yaml: {config.write_yaml!r} exists and is not overwritten. Remove it, or give "
            "another name."
        )
    if config.name and config.name != path.stem:
        raise ConfigError(
            f"name: got {config.name!r} with write_yaml={config.write_yaml!r}; the option's name "
            f"is the file's. Give write_yaml={path.with_name(config.name + '.yaml')}, or no name."
        )
    dataclasses.replace(config, name=path.stem)  # the same check for the file's name
    return path


def _write_yaml(config: InspectConfig, path: Path, source: str) -> None:
    from moe.convert.model_yaml import model_yaml
    from moe.train.atomic_files import replace_file

    path.parent.mkdir(parents=True, exist_ok=True)
    text = model_yaml(config.model, config.router, name=path.stem, source=f"From {source}")
    replace_file(path, text.encode())
    print(f"written: {path}")
    if path.parent.name == "model":
        print(
            f"train it: python launch/train.py --config-dir {path.parent.parent} model={path.stem}"
        )
    else:
        print(f"it is found as model={path.stem} in a folder named model, with --config-dir")


if __name__ == "__main__":
    run_command(
        "inspect_model",
        InspectConfig,
        inspect_model,
        about=__doc__,
        writes="write_yaml",
        literal=("run", "config_json", "write_yaml"),
    )
