"""What the command inspect_model can be told; the rules of moe/config.py hold here too."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from moe.config import RouterConfig
from moe.config_checks import check_at_least, check_one_of
from moe.convert.hf_config import DTYPE_NAMES
from moe.convert.hf_config_write import WINDOW_NAMES
from moe.errors import ConfigError
from moe.model_config import ModelConfig


@dataclass(frozen=True)
class InspectConfig:
    """launch/inspect_model.py: what a model of a given shape needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    run: str = ""  # instead of model: a run folder, one checkpoint's folder, a converted model
    config_json: str = ""  # instead of model: a published config.json, or the folder that has it
    window: str = "original"  # config_json only: who counts its sliding_window
    batch_size: int = 1
    seq_len: int = 0  # 0: the model's usable length, at most 4,096
    dtype: str = "bfloat16"  # of weights, cache and matrix products
    write_yaml: str = ""  # config_json only: write its model to this file, for model=NAME
    name: str = ""  # of that model; empty: the file's

    def __post_init__(self) -> None:
        check_one_of("dtype", self.dtype, DTYPE_NAMES)
        check_one_of("window", self.window, WINDOW_NAMES)
        check_at_least("batch_size", self.batch_size, 1)
        check_at_least("seq_len", self.seq_len, 0)
        if self.run and self.config_json:
            raise ConfigError(
                f"run: got {self.run!r} with config_json={self.config_json!r}; allowed: one of "
                "them. Remove the other."
            )
        for key in ("write_yaml", "name"):
            if getattr(self, key) and not self.config_json:
                raise ConfigError(
                    f"{key}: got {getattr(self, key)!r} without config_json; it is the model of a "
                    "published config.json that is written. Add config_json=PATH."
                )
        if self.name and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name, re.ASCII):
            raise ConfigError(
                f"name: got {self.name!r}; allowed: letters, digits, _ . and -, as in my_model."
            )
