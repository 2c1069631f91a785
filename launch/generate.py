"""Write text with a trained or converted model; it appears as it is made.

usage: python launch/generate.py run=FOLDER prompt=TEXT [key=value ...]

examples:
  python launch/generate.py run=runs/nano/2026-01-31_12-00-00 prompt='def area(r): return '
  python launch/generate.py run=runs/x prompt=- sampling.temperature=0 < prompt.txt
  python launch/generate.py run=runs/x chat=true
  python launch/generate.py run=runs/x prompts_file=questions.jsonl output=answers.jsonl
  python launch/generate.py run=models/phi prompt_ids=[1,450,7483] num_samples=4
run is a run folder (its newest good checkpoint), one checkpoint's folder, or a converted model.
prompt, prompts_file, system, output and run take any text as it stands, with no quotes but the
shell's; prompt=- reads it from standard input.
chat=true uses the model's chat template (chat_template=NAME another one): one answer to prompt, or,
without prompt, a conversation on the terminal that /exit or Ctrl-D ends; Ctrl-C stops an answer.
prompts_file has one prompt a line; a .jsonl file has one object a line, {"prompt": text},
{"messages": [{"role": "user", "content": text}]} or {"prompt_ids": [1, 2]}; an answer that
messages begin ("assistant" last) is gone on from. output gets one JSON object a text.
sampling.temperature=0 takes the most likely token; top_k=0, top_p=1 and repetition_penalty=1 are
off. A text does not depend on batch_size.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from command import run_command

from moe.config import CHAT_TEMPLATE_NAMES
from moe.config_checks import check_one_of
from moe.errors import ConfigError, UserError
from moe.inference_config import GenerateConfig
from moe.prompts_file import Prompt, as_conversation, read_prompts_file
from moe.run_folder import find_run

if TYPE_CHECKING:
    from writer import Writer

    from moe.chat import Message

_EXIT_WORDS = ("/exit", "/quit")


def generate(config: GenerateConfig) -> None:
    """Load the model and write: a continuation, an answer, a conversation, or many texts."""
    find_run(config.run)  # all of these before torch is imported
    if config.chat_template is not None:
        check_one_of("chat_template", config.chat_template, CHAT_TEMPLATE_NAMES)
    output = _output_path(config)
    prompts = _prompts(config)
    from many_texts import write_many
    from writer import open_writer

    writer = open_writer(config, prompts, notice=_notice)
    if prompts is None:
        _converse(writer)
    elif output is not None or config.prompts_file is not None or config.num_samples > 1:
        write_many(writer, prompts, output)
    else:
        _write_one(writer, prompts[0])


def _output_path(config: GenerateConfig) -> Path | None:
    """Where the texts go; refused now rather than after the first batch."""
    if config.output is None:
        return None
    path = Path(config.output).expanduser()
    if path.is_dir() or not path.parent.is_dir() or path.suffix != ".jsonl":
        what = "is a folder" if path.is_dir() else f"is in {str(path.parent)!r}, which is no folder"
        what = what if path.is_dir() or not path.parent.is_dir() else "has another ending"
        raise ConfigError(
            f"output: got {config.output!r}, which {what}; give a .jsonl file in a folder that "
            "exists, e.g. output=texts.jsonl."
        )
    return path


def _prompts(config: GenerateConfig) -> list[Prompt] | None:
    """What to go on from; None asks for a conversation."""
    if config.prompts_file is not None:
        return read_prompts_file(config.prompts_file, chat=config.chat, system=config.system)
    if config.prompt_ids is not None:
        return [Prompt("prompt_ids", config.prompt_ids)]
    text = _prompt_text(config)
    if text is None:
        return None
    prompt = Prompt("prompt", text)
    return [as_conversation(prompt, system=config.system) if config.chat else prompt]


def _prompt_text(config: GenerateConfig) -> str | None:
    """The prompt, read from standard input if it is "-"; None asks for a conversation."""
    if config.prompt == "-":
        return sys.stdin.read()
    if config.prompt is not None:
        return config.prompt
    if not config.chat:
        raise ConfigError(
            "prompt: not given; give a text, prompt=- to read standard input, prompts_file=FILE "
            "for many, or chat=true for a conversation."
        )
    if not sys.stdin.isatty():
        raise ConfigError(
            "prompt: not given, and standard input is no terminal to hold a conversation on. Give "
            "prompt=TEXT, or prompt=- to read standard input."
        )
    return None


def _write_one(writer: Writer, prompt: Prompt) -> None:
    """Write the prompt, unless it is a message, and what follows, as it is made."""
    ids = writer.prompt_ids(prompt)
    if isinstance(prompt.given, tuple):
        _say(" ".join(map(str, ids)))
        for token in writer.new_ids(ids):
            _say(f" {token}")
    else:
        _say(prompt.start)
        for text in writer.new_text(ids, starts_text=prompt.starts_text):
            _say(text)
    _say("\n")


def _converse(writer: Writer) -> None:
    """Read a line, answer, and so on, until /exit or the end of the input."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - its import gives input() line editing

    print("Say something; /exit or Ctrl-D ends, Ctrl-C stops an answer.")
    system = writer.config.system
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in _EXIT_WORDS:
            return
        if not line:
            continue
        try:
            messages = _answer(writer, [*messages, {"role": "user", "content": line}])
        except UserError as error:  # the message was too long; the conversation goes on without it
            print(f"error: {error}", file=sys.stderr, flush=True)


def _answer(writer: Writer, messages: list[Message]) -> list[Message]:
    """Write the answer to the last message; return the messages kept, the answer among them."""
    ids, kept = writer.chat_ids(messages, name="prompt")
    written: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):  # it ends the answer, not the conversation
        for text in writer.new_text(ids, starts_text=True):
            written.append(text)
            _say(text)
    _say("\n")
    return [*kept, {"role": "assistant", "content": "".join(written)}]


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _notice(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(
        "generate",
        GenerateConfig,
        generate,
        about=__doc__,
        writes="output",
        literal=("run", "prompt", "prompts_file", "system", "output"),
    )
