"""How every command starts: Hydra composes, dataclasses check, one message on a mistake.

Nothing heavy is imported before the configuration is known to be right, so a misspelt key is
answered in about a second. hydra and omegaconf are imported here, in mistakes.py and in
only_values.py only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import stat
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import ctrl_c  # noqa: F401  before what takes long to import
import hydra
from flags import FLAGS_WITH_A_VALUE, MULTIRUN_FLAGS, flags_last, refuse_flags
from home_paths import expand_home
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from mistakes import exit_on_mistake, name_the_file
from omegaconf import DictConfig, OmegaConf
from only_values import allow_only_values
from refused_by_hydra import CONF
from standard_streams import open_missing, take_any_text
from sweep_folder import no_empty_sweep
from typed import PRESETS, asked_keys, is_typed, refuse_idle_keys

from moe.config_from_dict import from_dict, known_keys
from moe.errors import ConfigError
from moe.train.redact import redact_texts
from moe.train.resume import go_on
from moe.waiting_threads import let_waiting_threads_sleep

T = TypeVar("T")
_HELP_FLAGS = ("--help", "-h")
_CAN_SWEEP = ("train",)
_FLAGS = """
flags:
  --cfg job             print the whole configuration and run nothing
  --config-dir FOLDER   your own files: FOLDER/experiment/mine.yaml is experiment=mine
  --hydra-help          every other flag"""
_MULTIRUN_HELP = """
  -m, --multirun        one run for each combination of values: seed=0,1 model=nano_moe,tiny_moe"""


def run_command(
    name: str,
    schema: type[T],
    task: Callable[[T], None],
    *,
    about: str | None,
    writes: str | None,
    literal: tuple[str, ...] = (),
    on_interrupt: str = "interrupted.",
) -> None:
    """Run task with the configuration conf/<name>.yaml plus the command line, as a schema object.

    about is the help text, before the list of groups and keys; writes is the key of the folder or
    file that task writes, named when the disk refuses; literal keys take their text as it stands,
    without Hydra's grammar, so that a prompt may hold any character.

    Exits 0 on success; a UserError prints one message on stderr and exits with its code (2, or 3
    where training itself had to stop); Ctrl-C exits 130. Other exceptions are bugs and keep their
    traceback.
    """
    open_missing()
    take_any_text()
    if any(flag in sys.argv[1:] for flag in _HELP_FLAGS):
        exit_on_mistake(
            lambda: print(_help(name, schema, about or "")),
            schema,
            name=name,
            writes=None,
            on_interrupt=on_interrupt,
            is_ours=lambda: True,
        )
        return
    let_waiting_threads_sleep(os.environ)
    _give_a_home()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand us the exception instead of printing it
    ConfigStore.instance().store(name=f"{name}_defaults", node=_defaults(schema))
    swept = {a.partition("=")[0] for a in sys.argv[1:] if re.search(r"=.*[,(]", a)}
    OmegaConf.register_new_resolver(
        "folder_name", lambda overrides: _folder_name(overrides, swept), replace=True
    )
    is_ours = True  # who runs: an odd exception of Hydra is a mistake, one of ours a bug
    num_jobs = 0

    def job(composed: DictConfig) -> None:
        nonlocal is_ours, num_jobs
        is_ours = True
        num_jobs += 1
        with _without_traces_of_a_sweep():
            exit_on_mistake(
                lambda: task(_checked(composed, schema, texts)),
                schema,
                name=name,
                writes=writes,
                on_interrupt=on_interrupt,
                is_ours=lambda: True,
            )

    def start() -> None:
        nonlocal is_ours
        _require_working_directory()
        refuse_flags(schema)
        sys.argv[1:] = flags_last(sys.argv[1:])
        is_ours = False
        with no_empty_sweep() as look_at:

            def on_composed(composed: DictConfig, *, is_sweep: bool) -> None:
                if is_sweep:
                    _refuse_multirun(can_sweep=name in _CAN_SWEEP)
                    look_at(composed)

            allow_only_values(on_composed)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(job)()
            if num_jobs == 0 and any(flag in sys.argv[1:] for flag in MULTIRUN_FLAGS):
                raise ConfigError(
                    "--multirun: what was typed makes no run: a range or a glob is empty. Give at "
                    "least one value, e.g. seed=0,1."
                )

    texts = _take_literals(literal)
    exit_on_mistake(
        start, schema, name=name, writes=writes, on_interrupt=on_interrupt,
        is_ours=lambda: is_ours,
    )  # fmt: skip


def arguments_of_this_run() -> list[str]:
    """Flags that choose files, then the overrides of this run: of a sweep, only its own values.

    References are resolved, so that every rank has what this process read, but those to a secret:
    the value of `${oc.env:NAME}` stays in the environment.
    """
    flags, typed = [], sys.argv[1:]
    for argument, following in zip(typed, [*typed, ""][1:], strict=True):
        name, sign, _ = argument.partition("=")
        if name in FLAGS_WITH_A_VALUE:
            flags += [argument] if sign else [argument, following]
    overrides = HydraConfig.get().overrides.task
    as_typed: Any = OmegaConf.to_container(overrides, resolve=False)
    shown = redact_texts(overrides, os.environ)
    return [
        *flags,
        *(
            resolved if resolved == hidden else typed
            for typed, resolved, hidden in zip(as_typed, overrides, shown, strict=True)
        ),
    ]


def _give_a_home() -> None:
    """A user of a container may have neither HOME nor a name; W&B and caches ask for their folder.

    It is the user's alone, because code is compiled into it.
    """
    with contextlib.suppress(RuntimeError):
        Path.home()
        return
    home = Path(tempfile.gettempdir()) / f"home-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    found = home.lstat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700 or home.is_symlink():
        home = Path(tempfile.mkdtemp(prefix="home-"))
    os.environ["HOME"] = str(home)


def _defaults(schema: type) -> dict[str, Any]:
    """The dataclass defaults as a plain dict, so that the YAML files say only what differs."""
    return dataclasses.asdict(schema())


def _checked(composed: DictConfig, schema: type[T], texts: dict[str, str]) -> T:
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    state = HydraConfig.get()
    refuse_idle_keys(
        state.job.config_name or "", launcher=values.get("launcher", {}).get("name", "")
    )
    _refuse_unplaced(values, schema, state)
    values = _with_texts(values, texts)
    expand_home(values)
    if "run_dir" in values.get("paths", {}):
        if state.mode == RunMode.MULTIRUN:
            values["paths"]["run_dir"] = state.runtime.output_dir  # each job its own folder
        elif is_typed("paths.run_dir") and values["paths"]["run_dir"]:
            values = go_on(Path(values["paths"]["run_dir"]), values, asked=asked_keys())
    try:
        return from_dict(schema, values)  # type: ignore[arg-type]
    except ConfigError as error:
        raise name_the_file(error, state) from None


def _refuse_unplaced(values: dict[Any, Any], schema: type, state: Any) -> None:
    """Refuse a preset whose file does not say that its keys are those of the whole."""
    for group in PRESETS:
        if group not in values or group in known_keys(schema):
            continue
        option = state.runtime.choices.get(group)
        found = [Path(s.path) / group / f"{option}.yaml" for s in state.runtime.config_sources]
        path = next((path for path in found if path.is_file()), f"{group}/{option}.yaml")
        has_mark = isinstance(path, Path) and path.read_bytes().startswith(b"\xef\xbb\xbf")
        raise ConfigError(
            f"{group}: {path} sets keys of other groups, and its first line does not say so; it "
            "must be `# @package _global_`"
            + (
                ", and the file must be saved as UTF-8 without a byte order mark."
                if has_mark
                else ", with keys below it such as `seed: 1`."
            )
        )


def _take_literals(keys: tuple[str, ...]) -> dict[str, str]:
    """Take key=text out of the command line, for Hydra's grammar refuses most punctuation."""
    texts, rest = {}, []
    for argument in sys.argv[1:]:
        key, sign, text = argument.partition("=")
        if sign and key in keys:
            texts[key] = text
        else:
            rest.append(argument)
    sys.argv[1:] = rest
    return texts


def _with_texts(values: dict[Any, Any], texts: dict[str, str]) -> dict[Any, Any]:
    for key, text in texts.items():
        group = values
        *parents, last = key.split(".")
        for parent in parents:
            group = group[parent]
        group[last] = text
    return values


def _require_working_directory() -> None:
    try:
        Path.cwd()
    except OSError:
        raise ConfigError(
            "working directory: it was removed while this shell was in it. Go to another with cd."
        ) from None


def _refuse_multirun(*, can_sweep: bool) -> None:
    if not can_sweep:
        raise ConfigError(
            "--multirun: this command does one thing at a time; allowed for launch/train.py. "
            "Call it once for each value."
        )
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size != "1":
        raise ConfigError(
            f"--multirun: got it with {world_size} processes (WORLD_SIZE); allowed: one process. "
            "Start torchrun once for each combination of values."
        )
    for argument in sys.argv[1:]:
        key, _, value = argument.lstrip("+~").partition("=")
        if key == "paths.run_dir":
            raise ConfigError(
                f"paths.run_dir: got {value!r} with --multirun, where every run has a folder of "
                "its own below hydra.sweep.dir. Leave it out, or set hydra.sweep.dir=FOLDER."
            )


@contextlib.contextmanager
def _without_traces_of_a_sweep():
    """Leave what a job itself writes: no overrides as they were typed, no folder without a run.

    Hydra saves the sweep's whole configuration, the values typed included; each run's config.json
    says the same with secrets taken out.
    """
    state = HydraConfig.get()
    if state.mode != RunMode.MULTIRUN:
        yield
        return
    (Path(state.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            Path(state.runtime.output_dir).rmdir()


def _folder_name(overrides: str, swept: set[str]) -> str:
    """The name of a sweep's run folder: what differs between its runs, without secrets.

    Special characters become dashes, so that the folder can be typed as a value again.
    """
    parts = [part for part in overrides.split(",") if part.partition("=")[0] in swept]
    shown = redact_texts(parts, os.environ)
    return re.sub(r"[^\w.-]+", "-", "_".join(shown)).strip("-")[:100] or "run"


def _help(name: str, schema: type, about: str) -> str:
    """About, then the groups that this command's defaults list names, then the other keys."""
    entries = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))["defaults"]  # type: ignore[index,call-overload]
    chosen = {
        group: option
        for entry in entries
        if isinstance(entry, dict)
        for group, option in entry.items()
        if not group.startswith("override ")
    }
    lines = [about.strip(), ""]
    if chosen:
        lines.append("groups (group=option; [the default]):")
    for group, option in sorted(chosen.items()):
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        shown = [f"[{o}]" if o == option else o for o in options]
        lines += textwrap.wrap(
            f"  {group:<12} {', '.join(shown)}", width=100, subsequent_indent=" " * 15
        )
    lines += ["", "keys:"] if chosen else ["keys:"]
    values = _defaults(schema)
    inner = {key.rpartition(".")[0] for key in known_keys(schema)}
    for key in known_keys(schema):
        if key.partition(".")[0] in chosen or key in inner:
            continue
        value: Any = values
        for part in key.split("."):
            value = value[part]
        lines.append(f"  {key}={_yaml_word(value)}")
    can_sweep = name in _CAN_SWEEP
    return "\n".join(lines) + "\n" + _FLAGS + (_MULTIRUN_HELP if can_sweep else "")


def _yaml_word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
