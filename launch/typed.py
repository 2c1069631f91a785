"""What the user typed: keys, groups, presets; and which of it this command could not obey."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from moe.config import PREPARED_KEYS, TrainConfig
from moe.data.manifest import Manifest
from moe.errors import ConfigError
from moe.train.resume import TYPED, flat

# groups whose files set keys of other groups; what they set was chosen for a new run
PRESETS = ("experiment", "sweep", "debug")
_PREPARED = (
    "what text and tokenizer training reads was decided when the data were prepared: give "
    "data.name or paths.data_dir of data prepared so. Leave this key out"
)
_NOT_READ = "prepare_data makes tokens, and only training reads {key}. Give it to launch/train.py"
_TORCHRUN = ("num_nodes", "processes_per_node", "max_restarts", "rendezvous", "node_rank",
             "min_nodes")  # fmt: skip
# command -> key or group -> why it would do nothing
_DOES_NOTHING: dict[str, dict[str, str]] = {
    # data.sources may be said again as the data were prepared from them: train.py compares
    "train": {key: _PREPARED for key in PREPARED_KEYS if key != "data.sources"},
    "prepare_data": dict.fromkeys(
        ("data.seq_len", "data.num_workers", "data.verify", "tokenizer.chat_template"), _NOT_READ
    ),
}  # fmt: skip
# launcher -> the keys of its group that it obeys
_OBEYED_BY: dict[str, tuple[str, ...]] = {
    "local": (),
    "torchrun": _TORCHRUN,
    "slurm": ("num_nodes", "processes_per_node", "max_restarts", "job_name", "time", "partition",
              "account", "qos", "constraint", "cpus_per_task", "gpus_per_node", "signal_seconds",
              "extra", "submit"),
    "hostfile": ("max_restarts", "rendezvous", "min_nodes", "hostfile", "ssh_config",
                 "connect_seconds"),
}  # fmt: skip


def typed_keys() -> dict[str, str]:
    """What the command line sets, keys and groups, to which text; of a sweep, this run's own."""
    typed = {}
    for argument in HydraConfig.get().overrides.task:
        key, sign, value = argument.lstrip("+~").partition("=")
        typed[key] = value if sign else ""
    return typed


def is_typed(key: str) -> bool:
    """Whether the user chose this run's value of a key; a sweep chooses its runs' folders."""
    is_sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    return key in typed_keys() or (key == "paths.run_dir" and is_sweep)


def asked_keys() -> dict[str, str]:
    """Each key that the command line sets, and how: TYPED, or the preset, "experiment=nano".

    A group's option sets the keys of its file, a preset those of its own and of the options that
    it chooses.
    """
    typed, asked = typed_keys(), dict[str, str]()
    for group in [*filter(typed.get, PRESETS), *typed]:
        option, how = typed[group], f"{group}={typed[group]}" if group in PRESETS else TYPED
        keys = set(_keys_of_option(group, option))
        if not keys and option not in ("", "null"):
            keys = {group}
        asked |= dict.fromkeys(keys, how)
    return asked


def refuse_idle_keys(command: str, *, launcher: str) -> None:
    """Raise ConfigError for a typed key that would do nothing in this command."""
    typed = typed_keys()
    for key, why in _DOES_NOTHING.get(command, {}).items():
        if key in typed:
            raise ConfigError(
                f"{key}: got {typed[key]!r}, which would do nothing in launch/{command}.py: "
                f"{why.format(key=key)}."
            )
    for key in typed:
        group, _, name = key.partition(".")
        if group == "launcher" and name and name != "name" and name not in _OBEYED_BY[launcher]:
            able = [other for other, names in _OBEYED_BY.items() if name in names]
            if able:
                raise ConfigError(
                    f"{key}: got {typed[key]!r}, which launcher={launcher} does not use; used by "
                    f"launcher={' and launcher='.join(able)}. Choose one of these, or leave the "
                    "key out."
                )


def refuse_other_data(config: TrainConfig, manifest: Manifest) -> None:
    """Raise ConfigError where the text or tokenizer that was typed is not that of the data."""
    typed, asked = typed_keys(), asked_keys()
    of_tokenizer = asked.get("tokenizer.vocab_size") == TYPED
    for key, is_chosen, wanted, found in (
        ("tokenizer.vocab_size", of_tokenizer, config.tokenizer.vocab_size, manifest.vocab_size),
        # not through data=files, whose list of sources is to be filled in
        ("data.sources", "data.sources" in typed, [*config.data.sources], [*manifest.sources]),
    ):
        if is_chosen and wanted != found:
            raise ConfigError(
                f"{key}: got {wanted}, and the data in {config.paths.data_dir} were prepared "
                f"with {found}, which nothing here changes. Give the folder of data prepared "
                "so as data.name or paths.data_dir, or leave the key out to train on these."
            )


def _keys_of_option(group: str, option: str) -> Iterator[str]:
    for source in HydraConfig.get().runtime.config_sources:
        path = Path(source.path) / group / f"{option}.yaml"
        # a key of no group may hold any text, also one that no file can be named by
        if source.schema == "file" and path.parent.is_dir() and path.is_file():
            values: Any = OmegaConf.to_container(OmegaConf.load(path))
            yield from _keys_of_values(group, values or {})
            return


def _keys_of_values(group: str, values: Mapping[str, Any]) -> Iterator[str]:
    is_preset = group in PRESETS
    for entry in values.get("defaults", ()):
        pairs = {group: entry} if isinstance(entry, str) else entry
        for name, option in pairs.items():
            inner = str(name).removeprefix("override ").lstrip("/")
            if option not in (None, "_self_"):
                yield from _keys_of_option(inner, str(option))
    rest = {key: value for key, value in values.items() if key != "defaults"}
    yield from flat(rest, "" if is_preset else f"{group}.")
