"""What the command compare can be told; the rules of moe/config.py hold here too."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

from moe.config_checks import check_at_least, check_one_of, check_seed
from moe.errors import ConfigError, nearest

EXPECTATIONS = ("lower", "higher", "unknown")
# what the runner decides for every run
_OURS = ("seed", "train.init_from", "train.resume", "paths.run_dir", "experiment", "hydra")


@dataclass(frozen=True)
class ArmConfig:
    """One kind of run, trained once with every seed."""

    name: str = ""
    label: str = ""  # in tables and figures; empty: the name
    overrides: tuple[str, ...] = ()  # of launch/train.py, on top of the experiment's
    flops_of: str | None = None  # as many steps as cost what that arm cost in all
    starts_from: str | None = None  # from that arm's last weights, of the same seed
    seed_offset: int = 0  # added to the seed: other text than the run it starts from has seen


@dataclass(frozen=True)
class ContrastConfig:
    """A pair of arms whose losses are compared, seed by seed."""

    arm: str = ""
    against: str = ""
    expects: str = "unknown"  # the published direction: the arm's loss is lower, or higher


@dataclass(frozen=True)
class ComparePaths:
    """Where runs and reports lie; relative paths start at the working directory."""

    runs: str = "runs/compare"
    reports: str = "analysis/reports"


@dataclass(frozen=True)
class CompareConfig:
    """launch/compare.py: arms x seeds, and what is asked of them."""

    name: str = ""
    experiment: str = ""  # the recipe that all arms share
    title: str = ""
    question: str = ""
    published: str = ""  # what is known from elsewhere
    source: str = ""
    arms: tuple[ArmConfig, ...] = ()
    contrasts: tuple[ContrastConfig, ...] = ()
    limits: tuple[str, ...] = ()  # what these runs cannot say, besides what no small run can
    seeds: tuple[int, ...] = (0, 1, 2)
    overrides: str = ""  # of launch/train.py, for every run, as on its command line
    evaluations: int = 6  # of a run, evenly; the last one at its end
    jobs: int = 0  # runs at once, one thread each; 0: one for each core
    report_only: bool = False  # write report and figure again from the report's CSV files
    paths: ComparePaths = field(default_factory=ComparePaths)

    def __post_init__(self) -> None:
        if not self.arms:  # nothing is chosen yet; the command says so
            return
        if not re.fullmatch(r"[a-z0-9_]+", self.name):
            raise ConfigError(
                f"name: got {self.name!r}; it names the report's folder. Allowed: small letters, "
                "digits and _."
            )
        check_at_least("evaluations", self.evaluations, 1)
        check_at_least("jobs", self.jobs, 0)
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(
                f"seeds: got {list(self.seeds)}; give at least one, and each once, e.g. [0,1,2]."
            )
        for seed in self.seeds:
            check_seed("seeds", seed)
        self._check_arms()
        for number, contrast in enumerate(self.contrasts):
            where = f"contrasts[{number}]"
            check_one_of(f"{where}.expects", contrast.expects, EXPECTATIONS)
            names = tuple(arm.name for arm in self.arms)
            check_one_of(f"{where}.arm", contrast.arm, names)
            check_one_of(f"{where}.against", contrast.against, names)
            if contrast.arm == contrast.against:
                raise ConfigError(
                    f"{where}: got the arm {contrast.arm!r} against itself; give two arms of "
                    f"{', '.join(names)}."
                )

    def _check_arms(self) -> None:
        known: list[str] = []
        for number, arm in enumerate(self.arms):
            where = f"arms[{number}]"
            if not re.fullmatch(r"[a-z0-9_]+", arm.name) or arm.name in known:
                raise ConfigError(
                    f"{where}.name: got {arm.name!r}; allowed: small letters, digits and _, and "
                    f"none of the arms above ({', '.join(known) or 'there are none'})."
                )
            for key in ("flops_of", "starts_from"):
                other = getattr(arm, key)
                if other is not None and other not in known:
                    raise ConfigError(
                        f"{where}.{key}: got {other!r}; allowed: an arm above {arm.name} in the "
                        f"list ({', '.join(known) or 'there are none'}).{nearest(other, known)}"
                    )
            check_at_least(f"{where}.seed_offset", arm.seed_offset, 0)
            refuse_own_keys(f"{where}.overrides", arm.overrides)
            known.append(arm.name)
        refuse_own_keys("overrides", self.common_overrides)

    @property
    def common_overrides(self) -> tuple[str, ...]:
        """overrides, split as a shell would."""
        try:
            return tuple(shlex.split(self.overrides))
        except ValueError as error:
            raise ConfigError(
                f"overrides: got {self.overrides!r}, which a shell would not read ({error}). Write "
                "e.g. overrides='train.steps=60 optim.warmup_steps=6'."
            ) from None

    def arm(self, name: str) -> ArmConfig:
        """The arm of that name, which must be there."""
        return next(arm for arm in self.arms if arm.name == name)


def refuse_own_keys(where: str, overrides: tuple[str, ...]) -> None:
    """Refuse what the runner itself decides for every run."""
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign:
            raise ConfigError(
                f"{where}: got {override!r}; allowed: key=value or group=option, as on the command "
                "line of launch/train.py."
            )
        if key.lstrip("+~").split(".")[0] == "hydra" or key.lstrip("+~") in _OURS:
            raise ConfigError(
                f"{where}: got {override!r}; {key} is decided for every run by launch/compare.py "
                "(seeds, experiment, starts_from, paths.runs). Remove it."
            )
