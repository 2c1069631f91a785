"""How a W&B run is started without telling it more than it needs; the only file importing wandb.

Nothing about the machine, the code, the command line or the environment is collected, and what is
shown (configuration, names, tags) is redacted first. Under `wandb agent` the sweep decides which
run and project this is, as W&B wants it.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from moe.config import LoggingConfig
from moe.errors import UserError
from moe.train.redact import redact

# wandb waits 90 s for a server that does not answer, and without end for the last upload
_CONNECT_SECONDS = 30.0
FINISH_SECONDS = 120.0
_REPLACED_FOLDER = "replaced"  # not matched by `wandb sync --sync-all`, which takes offline-run-*


def start_run(
    wandb: Any,
    config: LoggingConfig,
    *,
    run_dir: str | Path,
    run_id: str,
    run_name: str,
    values: Mapping[str, Any],
    program: str = "launch/train.py",
    finish_seconds: float = FINISH_SECONDS,
) -> Any:
    """Return the wandb Run whose files are in run_dir/wandb; values are its configuration.

    wandb: what import_wandb returned. Offline there is no server to ask, and a new folder stands
    for all of the run; online a run of this id goes on. finish_seconds: how long end_run waits for
    uploads. Raises UserError where online has no key, and for whatever keeps W&B from starting.
    """
    if config.wandb == "online":
        check_can_log_in(wandb)
    # wandb writes elsewhere if it is missing
    (Path(run_dir) / "wandb").mkdir(parents=True, exist_ok=True)
    # names are written into the run's file as the configuration is
    shown = redact(
        {"project": config.project, "group": config.group, "job_type": config.job_type,
         "name": run_name, "tags": list(config.tags)},
        os.environ,
    )  # fmt: skip
    try:
        return wandb.init(
            **shown, id=run_id, dir=str(run_dir), config=redact(dict(values), os.environ),
            mode=config.wandb, resume="allow", settings=_settings(wandb, program, finish_seconds),
        )  # fmt: skip
    except (wandb.Error, OSError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"logging.wandb: got {config.wandb!r}, and W&B could not start within "
            f"{_CONNECT_SECONDS:.0f} seconds: {reason}. Check WANDB_API_KEY and the network, or "
            "set logging.wandb=offline and send the run later with `wandb sync`."
        ) from error


def end_run(wandb: Any, run: Any) -> None:
    """Finish with complete files, uploads within the seconds that start_run was told."""
    run.finish()
    # finish returns before wandb's own process has written the last block; its end waits for it
    wandb.teardown()


def offline_folders(run_dir: str | Path, run_id: str) -> set[Path]:
    """The offline folders of a run below run_dir/wandb, one for each process that wrote it."""
    return set((Path(run_dir) / "wandb").glob(f"offline-run-*-{run_id}"))


def set_aside(folders: Sequence[Path]) -> None:
    """Move offline folders to replaced/ beside them, where `wandb sync --sync-all` skips them."""
    for folder in folders:
        target = folder.parent / _REPLACED_FOLDER
        target.mkdir(exist_ok=True)
        os.replace(folder, target / folder.name)


def import_wandb() -> Any:
    """Return the module wandb; UserError with what to install where it is missing."""
    # crash reports of wandb's own code would leave the machine, offline or not
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logging.wandb: the package wandb is not installed. Run `pip install wandb`, or set "
            "logging.wandb=disabled; metrics.jsonl holds the same numbers."
        ) from error
    return wandb


def check_can_log_in(wandb: Any) -> None:
    """Refuse now, with a message, what wandb would ask for on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return
    hosts = {"api.wandb.ai"}
    for url in (os.environ.get("WANDB_BASE_URL"), wandb.Settings().base_url):
        hosts |= {urlsplit(url).netloc} if url else set()
    if hosts.isdisjoint(_netrc_hosts()) and "default" not in _netrc_hosts():
        raise UserError(
            "logging.wandb: got 'online', but there is no W&B key. Set WANDB_API_KEY in the "
            "environment or run `wandb login` once, never put a key into a file of this project; "
            "or set logging.wandb=offline and send the run later with `wandb sync`."
        )


def _settings(wandb: Any, program: str, finish_seconds: float) -> Any:
    return wandb.Settings(
        console="off",  # the terminal may show anything
        disable_code=True,
        disable_git=True,  # the remote's URL may hold a password
        disable_job_creation=True,
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,  # holds argv, user, host and paths
        x_disable_stats=True,
        x_disable_viewer=True,
        x_save_requirements=False,
        label_disable=True,
        silent=True,
        symlink=False,
        program=program,
        host="",
        init_timeout=_CONNECT_SECONDS,
        login_timeout=_CONNECT_SECONDS,
        finish_timeout=finish_seconds,
        x_graphql_timeout_seconds=_CONNECT_SECONDS,
    )


def _netrc_hosts() -> set[str]:
    named = os.environ.get("NETRC")
    candidates = [named] if named else ["~/.netrc", "~/_netrc"]
    for candidate in candidates:
        path = os.path.expanduser(candidate)
        if os.path.exists(path):
            try:
                return set(netrc.netrc(path).hosts)
            except (OSError, netrc.NetrcParseError):
                return set()
    return set()
