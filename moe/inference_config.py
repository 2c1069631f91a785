"""What the commands generate and evaluate can be told; the rules of moe/config.py hold here too."""

from __future__ import annotations

from dataclasses import dataclass, field

from moe.config_checks import DEVICE_NAMES, check_at_least, check_one_of, check_seed
from moe.errors import ConfigError

JSON_LINES = (".jsonl", ".ndjson")  # endings of files of prompts
SPLIT_NAMES = ("train", "validation")


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one."""

    max_new_tokens: int = 120
    temperature: float = 0.7
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the text become less likely
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("sampling.max_new_tokens", self.max_new_tokens, 1)
        # below, logits divided by the temperature would leave the range of float32
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise ConfigError(
                f"sampling.temperature: got {self.temperature}; it must be 0 (the most likely "
                "token), or from 1e-06 to 1e+06."
            )
        check_at_least("sampling.top_k", self.top_k, 0)
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(
                f"sampling.top_p: got {self.top_p}; it must be above 0 and at most 1 (off)."
            )
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise ConfigError(
                f"sampling.repetition_penalty: got {self.repetition_penalty}; it must be from 0.01 "
                "to 100, and 1 is off. Usual: 1.05 to 1.3."
            )
        check_seed("sampling.seed", self.seed)


@dataclass(frozen=True)
class GenerateConfig:
    """launch/generate.py: write text with a trained or converted model."""

    run: str = ""  # a run folder (its newest good checkpoint), or one checkpoint's folder
    prompt: str | None = None  # the text to go on from; "-" reads standard input
    prompts_file: str | None = None  # many: .jsonl with "prompt" or "messages", else one a line
    prompt_ids: tuple[int, ...] | None = None  # token ids, for a model without a tokenizer
    chat: bool = False  # a prompt is a user's message; without one, a conversation on the terminal
    chat_template: str | None = None  # null: the model's own
    system: str = ""  # chat only: the system message
    add_bos: bool | None = None  # whether a text begins with <s>; null: as the model is used to
    stop_ids: tuple[int, ...] | None = None  # tokens that end a text; null: the model's own
    num_samples: int = 1  # texts for each prompt
    batch_size: int = 8  # texts written at once
    output: str | None = None  # a .jsonl file to write the texts to
    device: str = "auto"
    sampling: Sampling = field(
        default_factory=lambda: Sampling(max_new_tokens=200, temperature=0.7, top_p=0.95)
    )

    def __post_init__(self) -> None:
        check_one_of("device", self.device, DEVICE_NAMES)
        check_at_least("num_samples", self.num_samples, 1)
        check_at_least("batch_size", self.batch_size, 1)
        given = [
            name
            for name in ("prompt", "prompts_file", "prompt_ids")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise ConfigError(
                f"{given[1]}: given together with {given[0]}; one says what to go on from. "
                f"Remove {' or '.join(given)}."
            )
        if self.prompt_ids is not None and self.chat:
            raise ConfigError(
                "chat: got true with prompt_ids, which are continued as they stand. Remove one."
            )
        for name, value, plain in (
            ("output", self.output, None),
            ("num_samples", self.num_samples, 1),
        ):
            if value != plain and not given:
                raise ConfigError(
                    f"{name}: got {value!r} and nothing to go on from; give prompt, prompts_file "
                    "or prompt_ids."
                )
        self._check_chat_only()

    def _check_chat_only(self) -> None:
        """What only a conversation uses is refused elsewhere, rather than left out."""
        can_chat = self.chat or (self.prompts_file or "").endswith(JSON_LINES)
        for name in ("system", "chat_template"):
            if getattr(self, name) and not can_chat:
                raise ConfigError(
                    f"{name}: got {getattr(self, name)!r}, which only a conversation uses. Add "
                    "chat=true, or remove it."
                )


@dataclass(frozen=True)
class EvaluatePathsConfig:
    """Which prepared data to evaluate on."""

    data_dir: str | None = None  # null: the data that the run was trained on


@dataclass(frozen=True)
class EvaluateConfig:
    """launch/evaluate.py: how well a trained model predicts held-out text."""

    run: str = ""  # a run folder (its newest good checkpoint), or one checkpoint's folder
    split: str = "validation"
    max_tokens: int = 0  # whole documents up to about this many tokens; 0 for all
    batch_size: int = 16
    seq_len: int = 0  # 0: the run's own
    device: str = "auto"
    output: str | None = None  # a JSON file to write the numbers to
    paths: EvaluatePathsConfig = field(default_factory=EvaluatePathsConfig)

    def __post_init__(self) -> None:
        check_one_of("split", self.split, SPLIT_NAMES)
        check_one_of("device", self.device, DEVICE_NAMES)
        check_at_least("max_tokens", self.max_tokens, 0)
        check_at_least("batch_size", self.batch_size, 1)
        if self.seq_len != 0:
            check_at_least("seq_len", self.seq_len, 2)
