"""launch/generate.py: any prompt, streamed; chat one-shot and on a terminal; folders it takes."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FEW = "sampling.max_new_tokens=12"


def test_any_text_is_a_prompt_and_comes_back_before_what_was_written(command, workplace):
    prompt = "def f(x): # \"q\" 'r' ${name} {a: [1,2]} = \\ 100% ü 你 --help"
    done = command("generate", "run=runs/a", f"prompt={prompt}", FEW, cwd=workplace.folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt)
    assert len(done.stdout) > len(prompt) + 1


def test_a_prompt_from_standard_input_gives_the_same_text(command, workplace):
    prompt = "import os\n\ndef f("
    given = command("generate", "run=runs/a", f"prompt={prompt}", FEW, cwd=workplace.folder)
    piped = command("generate", "run=runs/a", "prompt=-", FEW, cwd=workplace.folder, stdin=prompt)
    assert given.returncode == piped.returncode == 0
    assert given.stdout == piped.stdout


def test_another_seed_writes_another_text(command, workplace):
    def text(*arguments: str) -> str:
        done = command(
            "generate", "run=runs/a", "prompt=def ", "sampling.max_new_tokens=30", *arguments,
            cwd=workplace.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert text("sampling.seed=1") != text("sampling.seed=2")


def test_one_checkpoint_or_the_checkpoints_folder_can_be_given(command, workplace):
    texts = []
    for run in ("runs/a/checkpoints", "runs/a/checkpoints/step_00000004",
                "runs/a/checkpoints/step_00000002"):  # fmt: skip
        done = command(
            "generate", f"run={run}", "prompt=a", "sampling.max_new_tokens=40", cwd=workplace.folder
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    newest, named, older = texts
    assert newest == named != older


def test_a_damaged_checkpoint_is_passed_over_with_a_note(command, workplace, tmp_path):
    place = workplace.copy(tmp_path).folder
    tensors = place / "runs/a/checkpoints/step_00000004/model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    done = command("generate", "run=runs/a", "prompt=a", FEW, cwd=place)
    older = command("generate", "run=runs/a/checkpoints/step_00000002", "prompt=a", FEW, cwd=place)
    assert done.returncode == 0
    assert "note: " in done.stderr
    assert "step_00000004" in done.stderr
    assert "model.safetensors" in done.stderr
    assert done.stdout == older.stdout


def test_a_reader_that_stops_reading_ends_it_quietly(workplace, environment):
    arguments = ["run=runs/a", "prompt=a", "sampling.max_new_tokens=3000", "sampling.top_p=1.0"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "generate.py"), *arguments], text=True,
        cwd=workplace.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == "a"  # streamed: it comes long before the end
    assert process.poll() is None
    process.stdout.close()
    complained = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert complained == ""


def test_one_chat_answer_is_not_a_continuation(command, workplace):
    arguments = ["run=runs/a", "prompt=def (x): hello?", "sampling.max_new_tokens=30"]
    chat = command("generate", *arguments, "chat=true", cwd=workplace.folder)
    system = command(
        "generate", *arguments, "chat=true", "system=Be (brief).", cwd=workplace.folder
    )
    assert chat.returncode == system.returncode == 0, system.stderr
    assert not chat.stdout.startswith("def (x): hello?")
    assert chat.stdout != system.stdout


class Terminal:
    """A process whose standard input and output are a terminal."""

    def __init__(self, arguments: list[str], *, cwd: Path, env: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=cwd, env=env | {"TERM": "dumb"}, close_fds=True,
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def wait_for(self, pattern: str, *, seconds: float = 90) -> str:
        """Read until pattern occurs; return the text up to its end and forget it."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if select.select([self._master], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self._master, 4096).decode(errors="replace")
                except OSError:  # the other end is closed
                    assert re.search(pattern, self.seen), self.seen
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()
            os.close(self._master)


@pytest.mark.slow
@pytest.mark.parametrize("goodbye", ["/exit\n", "\x04"], ids=["exit", "ctrl_d"])
def test_a_conversation_on_a_terminal_drops_its_oldest_turns_and_ends(
    goodbye, workplace, environment
):
    terminal = Terminal(
        [str(ROOT / "launch" / "generate.py"), "run=runs/a", "chat=true",
         "sampling.max_new_tokens=3600", "sampling.temperature=0"],
        cwd=workplace.folder, env=environment,
    )  # fmt: skip
    terminal.wait_for("Ctrl-C stops")
    said = ""
    for _ in range(4):  # each takes more than a third of the 496 tokens that are left
        said += terminal.wait_for("you> ")
        terminal.type("word " * 50 + "?\n")
        said += terminal.wait_for(r"\?\r\n(.|\n)*?\w")  # the answer has begun
        terminal.type("\x03")  # ends the answer, not the conversation
    said += terminal.wait_for("you> ")
    assert "oldest turn(s) are left out" in said
    assert "Traceback" not in said
    terminal.type("y" * 3000 + "\n")
    said = terminal.wait_for("you> ")
    assert "error: prompt: the message makes" in said
    terminal.type(goodbye)
    assert terminal.close() == 0
