"""A loaded model, and how texts begin and end with it: token ids of prompts, and texts of ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from moe.chat import Message, chat_prompt
from moe.data.chat_template import drops_system
from moe.data.load_tokenizer import TextTokenizer
from moe.errors import ConfigError, DataError
from moe.generate import generate
from moe.inference_config import GenerateConfig
from moe.load_run import LoadedRun, load_run, pick_device
from moe.prompts_file import Prompt
from moe.text_habits import begins_with_bos, stop_ids

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Writer:
    """What the habits of the model and the configuration come to."""

    run: LoadedRun
    config: GenerateConfig
    template: str
    adds_bos: bool
    stop_ids: tuple[int, ...]
    notice: Notice  # told of what is not as the user may expect

    @property
    def tokenizer(self) -> TextTokenizer:
        """DataError with what to do where the model came without one."""
        if self.run.tokenizer is None:
            raise DataError(
                f"run: {self.run.checkpoint.folder} came without a tokenizer, so it takes no text. "
                "Give token ids, prompt_ids=[1,2,3], or convert the model again with "
                "tokenizer=FILE."
            )
        return self.run.tokenizer

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, with what the model is used to at the front of a text."""
        given = prompt.given
        if isinstance(given, tuple):
            return list(given)
        if isinstance(given, list):
            return self.chat_ids(given, name=prompt.where)[0]
        ids = self.tokenizer.encode(given)
        return [self.tokenizer.bos_id, *ids] if self.adds_bos else ids

    def chat_ids(
        self, messages: Sequence[Message], *, name: str
    ) -> tuple[list[int], list[Message]]:
        """The ids of a conversation, and the messages in them; turns that do not fit are left
        out with a notice."""
        usable = self.run.model.config.usable_length
        prompt = chat_prompt(
            messages, self.tokenizer, template=self.template, usable_length=usable,
            max_new_tokens=self.config.sampling.max_new_tokens, name=name,
        )  # fmt: skip
        if prompt.num_dropped:
            self.notice(
                f"{name}: the {prompt.num_dropped} oldest turn(s) are left out: the conversation "
                f"is longer than the {usable} tokens that the model takes."
            )
        return prompt.ids, prompt.messages

    def new_ids(self, ids: Sequence[int]) -> Iterator[int]:
        """Token ids that follow, as they are drawn."""
        return generate(self.run.model, ids, self.config.sampling, stop_ids=self.stop_ids)

    def new_text(self, ids: Sequence[int], *, starts_text: bool) -> Iterator[str]:
        """The same as text; starts_text as in decode_stream."""
        return self.tokenizer.decode_stream(self.new_ids(ids), starts_text=starts_text)


def open_writer(
    config: GenerateConfig, prompts: Sequence[Prompt] | None, *, notice: Notice
) -> Writer:
    """Load the model; tell what its template or its files leave out."""
    run = load_run(config.run, device=pick_device(config.device), on_skip=notice)
    template = config.chat_template or run.config.tokenizer.chat_template
    if drops_system(template) and (config.system or any(map(_has_system, prompts or ()))):
        notice(
            f"the chat template {template} has no system messages: yours is left out. Write it "
            "into the user's message."
        )
    ends = stop_ids(run) if config.stop_ids is None else config.stop_ids
    outside = [token for token in ends if not 0 <= token < run.config.model.vocab_size]
    if outside:
        raise ConfigError(
            f"stop_ids: got {outside[0]}; model {run.config.model.name} has the ids 0 to "
            f"{run.config.model.vocab_size - 1}. Give ids of these, or null for the model's own."
        )
    if not ends:
        notice("no stop tokens are known for this model: texts end at sampling.max_new_tokens.")
    adds_bos = begins_with_bos(run.checkpoint) if config.add_bos is None else config.add_bos
    return Writer(run, config, template, adds_bos, ends, notice)


def _has_system(prompt: Prompt) -> bool:
    return isinstance(prompt.given, list) and prompt.given[0]["role"] == "system"
