"""A configuration holds values: what Hydra would run or import because of one is refused.

Hydra calls what `_target_` names under hydra.callbacks, launcher and sweeper, logging calls what a
logging configuration names, a search path may import a package, and every module of the namespace
hydra_plugins is imported at each start. Hydra's list of forbidden names is, in its own words, best
effort. So each configuration that it composes, for a run and for every job of a sweep, is compared
here with what ours say before Hydra takes a step.
"""

from __future__ import annotations

import re
import sys
from typing import Any, Protocol

import hydra._internal.hydra as hydra_internals
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from mistakes import name_the_file
from omegaconf import DictConfig, OmegaConf

from moe.errors import ConfigError

# of Hydra's own settings, those that are nothing but values
FREE = (
    "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.sweeper.params",
    "hydra.sweeper.max_batch_size", "hydra.verbose", "hydra.job.name",
)  # fmt: skip
_OF_A_SWEEP = ("hydra.sweep", "hydra.sweeper")
# the words of hydra.utils.instantiate
_CALLS = re.compile(r"_(target|args|partial|recursive|convert)_")
_NO_LOGGING = {"version": 1, "root": None, "disable_existing_loggers": False}
_CORE = "hydra._internal.core_plugins"
# what our own files leave of the settings by which code, the environment or files are reached
_FIXED = {
    "hydra.callbacks": {},
    "hydra.env": {},
    "hydra.launcher": {"_target_": f"{_CORE}.basic_launcher.BasicLauncher"},
    "hydra.sweeper._target_": f"{_CORE}.basic_sweeper.BasicSweeper",
    "hydra.job_logging": _NO_LOGGING,
    "hydra.hydra_logging": _NO_LOGGING,
    "hydra.searchpath": [],
    "hydra.job.chdir": None,
    "hydra.job.env_set": {},
    "hydra.job.env_copy": [],
    "hydra.output_subdir": None,
    "hydra.run.dir": ".",
}
_INSTEAD = {
    "hydra.run": " The folder of a run is paths.run_dir.",
    "hydra.launcher": " Processes are started by launcher=torchrun, slurm or hostfile.",
    "hydra.sweeper": " Values to combine go into hydra.sweeper.params.",
    "hydra.searchpath": " Your own files are found with --config-dir FOLDER.",
    "hydra.output_subdir": " The run folder's config.json has the values, without secrets.",
    "hydra.mode": " Several runs are made with -m.",
    "hydra.job": " Set a variable before the command: NAME=value python launch/...",
}
_WHY = "A configuration holds values and never names code to run"


class OnComposed(Protocol):
    """Called with each configuration that was composed and found to hold values only."""

    def __call__(self, composed: DictConfig, *, is_sweep: bool) -> None: ...


class _OnlyValues(ConfigLoaderImpl):
    """Hydra's loader, whose results are checked."""

    on_composed: OnComposed

    def load_configuration(self, config_name: str | None, *args: Any, **kwargs: Any) -> DictConfig:
        composed = super().load_configuration(config_name, *args, **kwargs)
        try:
            refuse_code(composed)
        except ConfigError as error:
            raise name_the_file(error, composed.hydra) from None
        self.on_composed(composed, is_sweep=composed.hydra.mode == RunMode.MULTIRUN)
        return composed

    def _process_config_searchpath(
        self, config_name: Any, parsed_overrides: Any, repo: Any
    ) -> None:
        """A path pkg://NAME imports NAME while the configuration is still being composed."""
        primary = repo.load_config(config_path=config_name) if config_name else None
        if primary and OmegaConf.select(primary.config, "hydra.searchpath"):
            raise _refused("hydra.searchpath")


def allow_only_values(on_composed: OnComposed) -> None:
    """From now on have every configuration checked that Hydra composes, and no plug-in imported."""
    members = {"on_composed": staticmethod(on_composed)}
    hydra_internals.ConfigLoaderImpl = type("_Loader", (_OnlyValues,), members)  # type: ignore[misc]
    sys.modules["hydra_plugins"] = None  # type: ignore[assignment]  # importing it fails: none there


def refuse_typed(argument: str, *, is_sweep: bool) -> None:
    """ConfigError for an override of what only our own files may say of Hydra."""
    key = argument.partition("=")[0].lstrip("+~").partition("@")[0].replace("/", ".")
    if not _is_open(key):
        raise _refused(key)
    if not is_sweep and any(_is_below(key, parent) for parent in _OF_A_SWEEP):
        raise ConfigError(
            f"{key}: it is about a sweep, and this is one run. Add -m, or leave the key out."
        )


def refuse_path(name: str, value: str) -> None:
    """ConfigError for a --config-path that is a package, which Hydra would import."""
    if "://" in value:
        raise ConfigError(
            f"{name}: got {value!r}; allowed: a folder of this machine. Your own files are found "
            "with --config-dir FOLDER."
        )


def refuse_code(composed: DictConfig) -> None:
    """ConfigError with the key where a composed configuration could make Hydra run code."""
    values = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(values, dict)
    hydra = values.pop("hydra")
    for key, expected in _FIXED.items():
        found = _at(hydra, key.removeprefix("hydra."))
        if found != expected:
            raise _refused(key)
    _check_hydra(hydra)
    params = _at(hydra, "sweeper.params") or {}
    for key in _keys(values, "") + _keys(params, "hydra.sweeper.params."):
        if _CALLS.search(key):
            raise _refused(key)
    for key in params:
        if not _is_open(str(key)):
            raise _refused(f"hydra.sweeper.params.{key}")


def _check_hydra(hydra: Any) -> None:
    """Refuse the values of free settings on which Hydra would break."""
    verbose, most = hydra["verbose"], _at(hydra, "sweeper.max_batch_size")
    if not isinstance(verbose, (bool, str, list)):
        raise ConfigError(f"hydra.verbose: got {verbose!r}; allowed: true or false.")
    if most is not None and most < 1:
        raise ConfigError(
            f"hydra.sweeper.max_batch_size: got {most}; it must be at least 1. Leave it out."
        )
    if not str(_at(hydra, "sweep.dir")).strip():
        raise ConfigError("hydra.sweep.dir: got an empty text; give the folder of the runs.")


def _is_open(key: str) -> bool:
    if _CALLS.search(key):
        return False
    return key.split(".")[0] != "hydra" or any(_is_below(key, free) for free in FREE)


def _refused(key: str) -> ConfigError:
    instead = next((text for k, text in _INSTEAD.items() if _is_below(key, k)), "")
    if _CALLS.search(key):
        return ConfigError(
            f"{key}: unknown key. {_WHY}; remove it. Parts are chosen by group, e.g. router=topk."
        )
    return ConfigError(
        f"{key}: it is a setting of Hydra that is not open here. {_WHY}; remove it.{instead}"
    )


def _is_below(key: str, parent: str) -> bool:
    return key == parent or key.startswith(f"{parent}.")


def _at(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _keys(values: Any, prefix: str) -> list[str]:
    """Every dotted key of nested dicts, those inside lists included."""
    if isinstance(values, list):
        within = prefix.removesuffix(".")
        return [key for i, v in enumerate(values) for key in _keys(v, f"{within}[{i}].")]
    if not isinstance(values, dict):
        return []
    keys = []
    for key, value in values.items():
        full = f"{prefix}{key}"
        keys += [full, *_keys(value, f"{full}.")]
    return keys
