"""Configuration of the watch: defaults that hold, and mistakes that name key, value and fix."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from moe.config_from_dict import from_dict
from moe.errors import ConfigError
from moe.watch_config import WatchConfig

ROOT = Path(__file__).parents[2]


def test_the_defaults_are_on_and_patient() -> None:
    config = WatchConfig()
    assert config.enabled
    assert (config.silent_seconds, config.stuck_seconds) == (60.0, 1800.0)


def test_a_run_file_may_give_whole_numbers() -> None:
    config = from_dict(WatchConfig, {"silent_seconds": 2, "stuck_seconds": 4})
    assert (config.silent_seconds, config.stuck_seconds) == (2.0, 4.0)


def test_equal_limits_are_allowed() -> None:
    assert WatchConfig(silent_seconds=1.0, stuck_seconds=1.0).stuck_seconds == 1.0


@pytest.mark.parametrize("key", ["silent_seconds", "stuck_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, 0.99, math.inf, math.nan])
def test_a_limit_below_a_second_or_without_end_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^watch\.{key}: got {value}; .*at least 1\.0"):
        WatchConfig(**{key: value})


def test_a_rank_cannot_be_stuck_before_it_is_silent() -> None:
    with pytest.raises(ConfigError, match=r"^watch\.stuck_seconds: got 5\.0; .*=10\.0.*lower"):
        WatchConfig(silent_seconds=10.0, stuck_seconds=5.0)


def test_the_file_imports_no_torch() -> None:
    program = "import sys, moe.watch_config; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False)
    assert done.returncode == 0
