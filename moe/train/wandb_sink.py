"""How records reach Weights & Biases; the only file that imports wandb.

Offline by default: a folder run_dir/wandb/offline-run-* that `wandb sync` sends later. The run
keeps its id over resumes, its step axis is the optimiser step, and no step is in it twice. Nothing
about the machine, the code, the command line or the environment is collected; the configuration
is redacted first.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from moe.config import LoggingConfig
from moe.errors import UserError
from moe.train.metrics import METRICS_FILE, Record, read_metrics
from moe.train.redact import redact

# wandb waits 90 s for a server that does not answer, and without end for the last upload
_CONNECT_SECONDS = 30.0
_FINISH_SECONDS = 120.0
_CELL_PIXELS = 12
_REPLACED_FOLDER = "replaced"  # not matched by `wandb sync --sync-all`, which takes offline-run-*


class WandbSink:
    """Records as one W&B run; construct on rank 0 only, close to finish the run.

    resumed_step None is a fresh run. Otherwise it is the step of the loaded checkpoint, and what
    the run does not hold yet is filled in from run_dir/metrics.jsonl up to that step. Offline that
    is everything: one folder holds the whole run, and the folders of earlier processes, with steps
    that a kill has undone, move to run_dir/wandb/replaced. Online the server keeps its history,
    and steps that it already has are not sent again.

    Raises UserError when wandb is missing, when online has no key or cannot connect. Mode disabled
    writes nothing and needs no wandb.
    """

    may_fail = True

    def __init__(
        self,
        config: LoggingConfig,
        *,
        run_dir: str | Path,
        run_id: str,
        run_name: str,
        resolved_config: Mapping[str, Any],
        resumed_step: int | None = None,
        heat_map_every: int = 100,
    ) -> None:
        self._wandb: Any = None
        self._run: Any = None
        self._heat_map_every = heat_map_every
        self._heat_map: tuple[int, np.ndarray] | None = None  # newest load not yet drawn
        self._last_drawn: int | None = None
        self._first_step = 0
        if config.wandb == "disabled":
            return
        self._wandb = _import_wandb()
        run_dir = Path(run_dir)
        if config.wandb == "online":
            _check_can_log_in(self._wandb)
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)  # wandb writes elsewhere if it is missing
        earlier = set(folder.glob(f"offline-run-*-{run_id}"))
        self._run = _start_run(
            self._wandb, config, run_dir=run_dir, run_id=run_id, run_name=run_name,
            values=redact(dict(resolved_config), os.environ),
        )  # fmt: skip
        if config.wandb == "online":
            self._first_step = self._run.starting_step
        if resumed_step is not None:
            self._replay(run_dir / METRICS_FILE, last_step=resumed_step)
        own = Path(self._run.dir).parent
        _set_aside(sorted(p for p in earlier if p.name != own.name), folder / _REPLACED_FOLDER)

    def write(self, step: int, record: Record) -> None:
        """Log a record; arrays per layer become scalars per layer and, now and then, a heat map."""
        if self._run is None or step < self._first_step:
            return
        load = record.get("router/load_LE")
        if load is not None:
            self._heat_map = (step, np.asarray(load, dtype=np.float64))
        values = scalars(record)
        # counted from the last picture, because log_every need not divide heat_map_every
        if load is not None and (
            self._last_drawn is None or step - self._last_drawn >= self._heat_map_every
        ):
            values |= self._draw()
        self._run.log(values, step=step)

    def close(self) -> None:
        """Log the last heat map and finish with complete files; uploads get two minutes at most."""
        if self._run is None:
            return
        run, self._run = self._run, None
        if self._heat_map is not None:
            step, _ = self._heat_map
            run.log(self._draw(), step=max(step, run.step))
        run.finish()
        # finish returns before wandb's own process has written the last block; its end waits for it
        self._wandb.teardown()

    def _draw(self) -> dict[str, Any]:
        assert self._heat_map is not None
        (step, load_LE), self._heat_map = self._heat_map, None
        self._last_drawn = step
        if load_LE.ndim != 2 or load_LE.size == 0 or not _has("PIL"):
            return {}
        caption = (
            f"step {step}: rows are layers from the top, columns experts; white is the ideal load "
            "1/E, blue twice that or more, orange less, black none"
        )
        return {"router/load": self._wandb.Image(load_picture(load_LE), caption=caption)}

    def _replay(self, path: Path, *, last_step: int) -> None:
        if not path.exists():
            return
        for record in read_metrics(path):
            if self._first_step <= record["step"] <= last_step:
                self._run.log(scalars(record), step=record["step"])
                self._last_drawn = record["step"]


def scalars(record: Record) -> dict[str, float | int | bool | str]:
    """The record without its arrays, which become a few numbers for each layer.

    Per layer: router/layer_00/max_load and min_load, the largest and smallest share of routed rows
    of an expert over the ideal share 1/E (1 is balanced, 0 dead), and entropy in nats.
    """
    flat = {
        key: value
        for key, value in record.items()
        if isinstance(value, (bool, int, float, str)) and key not in ("step", "kind")
    }
    for layer, load_E in enumerate(record.get("router/load_LE") or ()):
        if len(load_E):
            flat[f"router/layer_{layer:02d}/max_load"] = float(max(load_E)) * len(load_E)
            flat[f"router/layer_{layer:02d}/min_load"] = float(min(load_E)) * len(load_E)
    for layer, entropy in enumerate(record.get("router/entropy_L") or ()):
        flat[f"router/layer_{layer:02d}/entropy"] = float(entropy)
    return flat


def load_picture(load_LE: np.ndarray) -> np.ndarray:
    """A (12 L, 12 E, 3) uint8 picture of load over ideal: orange below 1, white at 1, blue above.

    The two hues are told apart by all common kinds of colour blindness; dead experts are black.
    """
    ratio = np.nan_to_num(load_LE * load_LE.shape[1], nan=0.0)
    ends = {"less": (179, 88, 6), "more": (5, 48, 97)}
    white = np.full(3, 255.0)
    side = np.where((ratio < 1)[..., None], np.array(ends["less"]), np.array(ends["more"]))
    strength = np.clip(np.abs(ratio - 1), 0, 1)[..., None]
    colour = (1 - strength) * white + strength * side
    colour[ratio == 0] = 0
    pixels = colour.round().astype(np.uint8)
    return pixels.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1)


def _import_wandb() -> Any:
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


def _start_run(
    wandb: Any,
    config: LoggingConfig,
    *,
    run_dir: Path,
    run_id: str,
    run_name: str,
    values: dict[str, Any],
) -> Any:
    settings = wandb.Settings(
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
        program="launch/train.py",
        host="",
        init_timeout=_CONNECT_SECONDS,
        login_timeout=_CONNECT_SECONDS,
        finish_timeout=_FINISH_SECONDS,
        x_graphql_timeout_seconds=_CONNECT_SECONDS,
    )
    # names are written into the run's file as the configuration is
    shown = redact(
        {"project": config.project, "group": config.group, "job_type": config.job_type,
         "name": run_name},
        os.environ,
    )  # fmt: skip
    try:
        return wandb.init(
            **shown, id=run_id, dir=str(run_dir), config=values, mode=config.wandb,
            # offline there is no server to ask, and the new folder replaces the old ones
            resume="allow", settings=settings,
        )  # fmt: skip
    except (wandb.Error, OSError, TimeoutError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"logging.wandb: got {config.wandb!r}, and W&B could not start within "
            f"{_CONNECT_SECONDS:.0f} seconds: {reason}. Check WANDB_API_KEY and the network, or "
            "set logging.wandb=offline and send the run later with `wandb sync`."
        ) from error


def _check_can_log_in(wandb: Any) -> None:
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


def _set_aside(folders: Sequence[Path], target: Path) -> None:
    for folder in folders:
        target.mkdir(exist_ok=True)
        os.replace(folder, target / folder.name)


def _has(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None
