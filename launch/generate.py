"""Write text with a trained model; it appears as it is made.

usage: python launch/generate.py run=FOLDER prompt=TEXT [key=value ...]

examples:
  python launch/generate.py run=runs/nano/2026-01-31_12-00-00 prompt='def area(r): return '
  python launch/generate.py run=runs/x prompt=- sampling.temperature=0 < prompt.txt
  python launch/generate.py run=runs/x chat=true
run is a run folder (its newest good checkpoint) or one checkpoint's folder. prompt, system and run
take any text as it stands, with no quotes but the shell's; prompt=- reads it from standard input.
chat=true uses the Phi-3.5 template: one answer to prompt, or, without prompt, a conversation on the
terminal that /exit or Ctrl-D ends; Ctrl-C stops an answer. sampling.temperature=0 takes the most
likely token; top_k=0 and top_p=1 are off.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from command import run_command

from moe.errors import ConfigError, UserError
from moe.inference_config import GenerateConfig
from moe.run_folder import find_run

if TYPE_CHECKING:
    from moe.load_run import LoadedRun

_EXIT_WORDS = ("/exit", "/quit")


def generate(config: GenerateConfig) -> None:
    """Load the run and write: a continuation, one answer, or a conversation."""
    find_run(config.run)  # before torch is imported
    prompt = _prompt_text(config)
    from moe.load_run import load_run, pick_device

    run = load_run(config.run, device=pick_device(config.device), on_skip=_notice)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the character shows "?"
    if prompt is None:
        _converse(run, config)
    elif config.chat:
        _answer(run, config, [*_system(config), {"role": "user", "content": prompt}])
    else:
        _say(prompt)
        _write(run, config, [run.tokenizer.bos_id, *run.tokenizer.encode(prompt)])
        _say("\n")


def _prompt_text(config: GenerateConfig) -> str | None:
    """The prompt, read from standard input if it is "-"; None asks for a conversation."""
    if config.prompt == "-":
        return sys.stdin.read()
    if config.prompt is not None:
        return config.prompt
    if not config.chat:
        raise ConfigError(
            "prompt: not given; give a text, prompt=- to read standard input, or chat=true for a "
            "conversation."
        )
    if not sys.stdin.isatty():
        raise ConfigError(
            "prompt: not given, and standard input is no terminal to hold a conversation on. Give "
            "prompt=TEXT, or prompt=- to read standard input."
        )
    return None


def _converse(run: LoadedRun, config: GenerateConfig) -> None:
    """Read a line, answer, and so on, until /exit or the end of the input."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - its import gives input() line editing

    print("Say something; /exit or Ctrl-D ends, Ctrl-C stops an answer.")
    messages = _system(config)
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
            messages = _answer(run, config, [*messages, {"role": "user", "content": line}])
        except UserError as error:  # the message was too long; the conversation goes on without it
            print(f"error: {error}", file=sys.stderr, flush=True)


def _answer(
    run: LoadedRun, config: GenerateConfig, messages: list[dict[str, str]]
) -> list[dict[str, str]]:
    """Write the answer to the last message; return the messages kept, the answer among them."""
    from moe.chat import chat_prompt

    prompt = chat_prompt(
        messages,
        run.tokenizer,
        usable_length=run.model.config.usable_length,
        max_new_tokens=config.sampling.max_new_tokens,
    )
    if prompt.num_dropped:
        _notice(
            f"the {prompt.num_dropped} oldest turn(s) are left out: the conversation is longer "
            f"than the {run.model.config.usable_length} tokens that the model takes."
        )
    answer = _write(run, config, prompt.ids, starts_text=True)
    _say("\n")
    return [*prompt.messages, {"role": "assistant", "content": answer}]


def _write(
    run: LoadedRun, config: GenerateConfig, ids: Sequence[int], *, starts_text: bool = False
) -> str:
    """Write the text that follows ids as it is made, and return it; Ctrl-C stops it in a chat."""
    from moe.generate import generate as new_tokens

    stream = new_tokens(run.model, ids, config.sampling, stop_ids=run.tokenizer.stop_ids)
    written = []
    try:
        for text in run.tokenizer.decode_stream(stream, starts_text=starts_text):
            written.append(text)
            _say(text)
    except KeyboardInterrupt:
        if config.prompt is not None:
            raise
    return "".join(written)


def _system(config: GenerateConfig) -> list[dict[str, str]]:
    return [{"role": "system", "content": config.system}] if config.system else []


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
        writes=None,
        literal=("run", "prompt", "system"),
    )
