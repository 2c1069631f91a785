"""launch/generate.py: any prompt, streamed; many; chat one-shot and on a terminal; its folders."""

from __future__ import annotations

import dataclasses
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moe.config import TokenizerConfig, TrainConfig
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.train.checkpoint import save_checkpoint

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


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_texts_that_do_not_depend_on_the_batches(
    command, workplace, tmp_path
):
    conversation = [{"role": "user", "content": "import what?"}]
    prompts = [{"prompt": "def f("}, {"messages": conversation}, {"prompt_ids": [1, 70, 80]}]
    source = tmp_path / "my (1) prompts.jsonl"
    source.write_text("\n".join(map(json.dumps, prompts)))
    made = []
    for batch_size in (1, 4):
        output = tmp_path / f"{batch_size} = texts.jsonl"
        output.write_text("old\n" * 50)
        done = command(
            "generate", "run=runs/a", f"prompts_file={source}", f"output={output}", FEW,
            "num_samples=2", f"batch_size={batch_size}", "sampling.repetition_penalty=1.1",
            cwd=workplace.folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"output: {output}, 6 text(s)\n"
        made.append(records_of(output))
    assert made[0] == made[1]
    assert [record["sample"] for record in made[0]] == [0, 1] * 3
    for record, prompt in zip(made[0], [p for p in prompts for _ in range(2)], strict=True):
        assert record.items() >= prompt.items()
        assert record["finish"] == ("stop" if len(record["ids"]) < 12 else "length")
        assert ("text" in record) == ("prompt_ids" not in prompt)
    # the first text is what the prompt alone gives
    one = command(
        "generate", "run=runs/a", "prompt=def f(", FEW, "sampling.repetition_penalty=1.1",
        cwd=workplace.folder,
    )  # fmt: skip
    assert one.stdout == f"def f({made[0][0]['text']}\n"


def test_several_samples_of_a_prompt_and_lines_of_a_file_are_shown_one_after_the_other(
    command, workplace, tmp_path
):
    done = command("generate", "run=runs/a", "prompt=a", "num_samples=3", FEW, cwd=workplace.folder)
    assert done.returncode == 0, done.stderr
    texts = re.split(r"^--- prompt, sample \d\n", done.stdout, flags=re.MULTILINE)
    assert texts[0] == ""
    assert len(set(texts[1:])) == 3
    assert all(text.startswith("a") for text in texts[1:])
    (tmp_path / "p.txt").write_text("x = 1\ny = 2\n")
    done = command(
        "generate", "run=runs/a", f"prompts_file={tmp_path / 'p.txt'}", FEW, cwd=workplace.folder
    )
    assert done.returncode == 0, done.stderr
    assert f"--- {tmp_path / 'p.txt'}, line 1\nx = 1" in done.stdout
    assert f"--- {tmp_path / 'p.txt'}, line 2\ny = 2" in done.stdout


def test_a_prompt_that_is_too_long_costs_nothing_that_was_there(command, workplace, tmp_path):
    source, output = tmp_path / "p.txt", tmp_path / "texts.jsonl"
    source.write_text("short\n" + "word " * 6000)
    output.write_text("old\n")
    done = command(
        "generate", "run=runs/a", f"prompts_file={source}", f"output={output}", "batch_size=1", FEW,
        cwd=workplace.folder,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{source}, line 2 of " in done.stderr
    assert "takes 4096" in done.stderr
    assert output.read_text() == "old\n"


@pytest.fixture(scope="module")
def bare_model(tmp_path_factory) -> Path:
    """A bfloat16 model as a conversion leaves it, without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    shape = ModelConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=16, num_experts=0, norm="rmsnorm", attention_bias=False, head_bias=False,
    )  # fmt: skip
    config = TrainConfig(model=shape, tokenizer=TokenizerConfig(chat_template="phi3_april"))
    model = build_model(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    published = {"hf_config.json": b"{}", "hf_generation_config.json": b'{"eos_token_id": [63]}'}
    return save_checkpoint(
        folder, 0, tensors={"model": dict(model.named_parameters())}, keep_last=1,
        state={"train": {"precision": "bfloat16"}},
        extra_files=published | {"config.json": json.dumps(dataclasses.asdict(config)).encode()},
    )  # fmt: skip


def test_a_model_without_a_tokenizer_goes_on_from_token_ids(command, bare_model, tmp_path):
    arguments = [f"run={bare_model}", "prompt_ids=[5,6,7]", "sampling.temperature=0", FEW]
    done = command("generate", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    ids = [int(word) for word in done.stdout.split()]
    assert ids[:3] == [5, 6, 7]
    assert 3 < len(ids) <= 15
    stopped = command("generate", *arguments, f"stop_ids=[{ids[4]}]", cwd=tmp_path)
    assert [int(word) for word in stopped.stdout.split()] == ids[: ids.index(ids[4], 3)]
    refused = command("generate", f"run={bare_model}", "prompt=a", cwd=tmp_path)
    assert refused.returncode == 2
    assert "came without a tokenizer" in refused.stderr
    assert "prompt_ids=[1,2,3]" in refused.stderr


def test_the_template_that_is_asked_for_is_used_and_says_if_it_drops_the_system_message(
    command, workplace
):
    arguments = ["run=runs/a", "chat=true", "prompt=Hello?", "sampling.max_new_tokens=30"]
    own = command("generate", *arguments, cwd=workplace.folder)
    april = command(
        "generate", *arguments, "chat_template=phi3_april", "system=Be brief.",
        cwd=workplace.folder,
    )  # fmt: skip
    assert own.returncode == april.returncode == 0
    assert own.stderr == ""
    assert own.stdout != april.stdout
    assert april.stderr.startswith("note: the chat template phi3_april has no system messages")


@pytest.mark.parametrize(("arguments", "words"), [
    (["prompt=a", "chat=true", "chat_template=phi4"], ["chat_template: got 'phi4'", "phi35, phi3"]),
    (["prompts_file=nope.txt"], ["prompts_file: 'nope.txt' cannot be read"]),
    (["prompt=a", "output=nowhere/a.jsonl"], ["output: got 'nowhere/a.jsonl'", "no folder"]),
    (["prompt=a", "output=a.txt"], ["output: got 'a.txt'", "another ending", "texts.jsonl"]),
])  # fmt: skip
def test_a_mistake_is_answered_before_torch_is_imported(
    arguments, words, command, workplace, environment, tmp_path
):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = os.pathsep.join((str(tmp_path), environment["PYTHONPATH"]))
    done = command(
        "generate", "run=runs/a", *arguments, cwd=workplace.folder, env={"PYTHONPATH": path}
    )
    assert done.returncode == 2
    assert all(word in done.stderr for word in words), done.stderr
    assert "torch was imported" not in done.stderr


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
@pytest.mark.parametrize(
    "goodbye",
    [pytest.param("/exit\n", id="exit"), pytest.param("\x04", id="ctrl_d", marks=pytest.mark.long)],
)
def test_a_conversation_on_a_terminal_drops_its_oldest_turns_and_ends(
    goodbye, workplace, environment
):
    terminal = Terminal(
        [str(ROOT / "launch" / "generate.py"), "run=runs/a", "chat=true",
         "sampling.max_new_tokens=3600", "sampling.temperature=1"],
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
