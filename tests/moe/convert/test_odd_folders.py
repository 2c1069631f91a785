"""Odd folders, each converted or refused by one message that names the file; never a traceback."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import CONFIGS, SHAPES, random_tensors, write_folder

from moe.convert.import_model import import_model
from moe.convert.tokenizer_files import hugging_face_tokenizer_files
from moe.data.load_tokenizer import load_tokenizer
from moe.errors import UserError
from moe.load_run import load_run
from moe.prompts_file import read_prompts_file
from moe.text_habits import begins_with_bos, stop_ids

CONFIG = {**CONFIGS["phimoe"], "vocab_size": 576}
TENSORS = random_tensors(SHAPES["phimoe"](CONFIG))
Edit = Callable[[Path], object]


@pytest.fixture(scope="module")
def tokenizer_files(short_documents: Path) -> dict[str, bytes]:
    tokenizer = load_tokenizer(short_documents / "tokenizer.model")
    return hugging_face_tokenizer_files(
        tokenizer, chat_template="phi35", max_length=64, adds_bos=True
    )


def config(**changes: Any) -> Edit:
    return write("config.json", json.dumps({**CONFIG, **changes}))


def write(name: str, content: str | bytes) -> Edit:
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def change(name: str, edit: Callable[[dict[str, Any]], object]) -> Edit:
    def changed(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        edit(values)
        (folder / name).write_text(json.dumps(values))

    return changed


def folder_for(name: str) -> Edit:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def pipe(name: str) -> Edit:
    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def json_alone(name: str, edit: Callable[[dict[str, Any]], object]) -> Edit:
    def made(folder: Path) -> None:
        (folder / "tokenizer.model").unlink()
        change(name, edit)(folder)

    return made


def add_token(**parts: Any) -> Callable[[dict[str, Any]], object]:
    return lambda whole: whole["added_tokens"].append({"id": 512, "content": "<x>", **parts})


# what a folder's edit is refused with; None: it is converted, and opens
ODD: dict[str, tuple[Edit, str | None]] = {
    "byte order mark": (write("config.json", "\ufeff{}"), "Unexpected UTF-8 BOM"),
    "a list": (write("config.json", "[]"), r"config\.json: it is \[\]"),
    "deep": (write("config.json", '{"a":' * 100_000), r"config\.json: it is nested too deeply"),
    "half a surrogate": (write("config.json", '{"model_type": "\ud800"}'), r"config\.json: "),
    "escaped half": (write("config.json", r'{"model_type": "\ud800"}'), "model_type: got"),
    "type a list": (config(model_type=["phimoe"]), "model_type: got a list"),
    "text inside": (write("config.json", '{"text_config": {}}'), "model_type: got nothing"),
    "no rows": (config(vocab_size=0), "vocab_size: got 0"),
    "a million layers": (config(num_hidden_layers=10**6), "says 1,000,000 layers of 4 experts"),
    "width a flag": (config(hidden_size=True), "hidden_size: got true"),
    "rope a list": (config(rope_scaling=[1]), "rope_scaling: got a list"),
    "rope a text": (config(rope_parameters="su"), "rope_parameters: got 'su'"),
    "rope of layers": (config(rope_parameters={"full": {"rope_theta": 1}}), "full: got an object"),
    "numbers of 8 bits": (config(torch_dtype="int8"), "torch_dtype: got 'int8'"),
    "quantised": (config(quantization_config={}), "quantization_config"),
    "not a number": (write("config.json", json.dumps({**CONFIG, "rope_theta": float("nan")})),
                     "rope_theta: got nan"),
    "config a folder": (folder_for("config.json"), r"config\.json: "),
    "config a pipe": (pipe("config.json"), "not an ordinary file"),
    "tokenizer a folder": (folder_for("tokenizer.json"), r"tokenizer\.json: "),
    "model a folder": (folder_for("tokenizer.model"), r"tokenizer\.model: "),
    "model a pipe": (pipe("tokenizer.model"), "not an ordinary file"),
    "tokenizer empty": (write("tokenizer.json", ""), r"tokenizer\.json: "),
    "settings a list": (write("tokenizer_config.json", "[]"), r"tokenizer_config\.json: "),
    "settings odd": (write("tokenizer_config.json", '{"add_bos_token": "yes", '
                           '"added_tokens_decoder": {"x": 1, "7": null, "8": {"content": 3}}, '
                           '"chat_template": [1, {"name": "default"}, {"template": 4}]}'), None),
    "added odd": (write("added_tokens.json", '{"a": null, "b": "c", "d": [1]}'), None),
    "added a list": (write("added_tokens.json", "[1]"), r"added_tokens\.json: "),
    "template empty": (write("chat_template.jinja", ""), None),
    "template huge": (write("chat_template.jinja", "{% if x %}" * 100_000), None),
    "template binary": (write("chat_template.jinja", b"\xff"), r"chat_template\.jinja: "),
    "no tokenizer left": (write("tokenizer.model", b"\n"), None),
    "merges a number": (json_alone("tokenizer.json", lambda w: w["model"].update(merges=3)), None),
    "a piece twice": (json_alone("tokenizer.json", lambda w: w["model"]["vocab"].update(zz=5)),
                      None),
    "ids of text": (json_alone("tokenizer.json", lambda w: w["model"]["vocab"].update(zz="5")),
                    None),
    "a large id": (json_alone("tokenizer.json", add_token(id=10**30)), None),
    "a piece of half": (
        json_alone("tokenizer.json", lambda w: w["model"]["vocab"].update({"\ud800": 501})), None,
    ),
    "a thousand million experts": (config(num_local_experts=2**30), "1,073,741,824 experts"),
    "an id below 0": (json_alone("tokenizer.json", add_token(id=-1)), None),
    "no content": (json_alone("tokenizer.json", add_token(content="")), None),
    "content a list": (json_alone("tokenizer.json", add_token(content=[1])), None),
    "a word of spaces": (json_alone("tokenizer.json", add_token(content="  ")), None),
    "a word of half": (json_alone("tokenizer.json", add_token(content="\ud800")), None),
    "normalizer odd": (json_alone("tokenizer.json", lambda w: w.update(normalizer=[1])), None),
    "steps odd": (json_alone("tokenizer.json", lambda w: w.update(
        normalizer={"type": "Sequence", "normalizers": 3})), None),
    "cutter odd": (json_alone("tokenizer.json", lambda w: w.update(pre_tokenizer=[])), None),
    "added missing": (json_alone("tokenizer.json", lambda w: w.pop("added_tokens")), None),
    "post odd": (json_alone("tokenizer.json", lambda w: w.update(post_processor=[{}])), None),
    "stops a text": (write("generation_config.json", '{"eos_token_id": "</s>"}'), "stop_ids="),
    "stops nested": (write("generation_config.json", '{"eos_token_id": [[2]]}'), "stop_ids="),
    "generation empty": (write("generation_config.json", ""), r"generation_config\.json: "),
    "tensors empty": (write("model.safetensors", b""), r"model\.safetensors: "),
    "no tensors": (write("model.safetensors", b"\2\0\0\0\0\0\0\0{}"), r"tensor\(s\) of the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_folder_is_converted_or_refused_by_one_message(
    name: str, tokenizer_files: dict[str, bytes], tmp_path: Path
) -> None:
    edit, words = ODD[name]
    source = write_folder(tmp_path / "hf", CONFIG, TENSORS)
    for file, content in tokenizer_files.items():
        (source / file).write_bytes(content)
    edit(source)
    if words is None:
        use(source, tmp_path / "ours")
        return
    with pytest.raises(UserError, match=words) as caught:
        use(source, tmp_path / "ours")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700


def use(source: Path, target: Path) -> None:
    """Convert, open, and ask how texts begin and end, as generate does."""
    done = import_model(
        source, target, window="original", tokenizer=None, on_progress=lambda *_: None
    )
    assert all(note.isprintable() and len(note) < 900 for note in done.notes)
    run = load_run(str(target), device=torch.device("cpu"), on_skip=pytest.fail)
    assert (run.tokenizer is not None) == done.has_tokenizer
    begins_with_bos(run.checkpoint)
    stop_ids(run)
    for text in ("a  b", "<x>  <think>"):
        if run.tokenizer is not None:
            run.tokenizer.decode(run.tokenizer.encode(text))


PROMPTS: dict[str, bytes] = {
    "half a surrogate": rb'{"prompt": "\ud800"}', "a key twice": b'{"prompt": "a", "prompt": "b"}',
    "not a number": b'{"prompt_ids": [NaN]}', "a null byte": b'{"prompt": "\\u0000"}\0',
    "a large id": b'{"prompt_ids": [%d]}' % 10**30, "a negative id": b'{"prompt_ids": [-1]}',
    "no ids": b'{"prompt_ids": []}', "role a list": b'{"messages": [{"role": ["user"]}]}',
    "content an object": b'{"messages": [{"role": "user", "content": {"text": "a"}}]}',
    "parts odd": b'{"messages": [{"role": "user", "content": [1, null, {"type": "text"}]}]}',
    "an array": b'[{"prompt": "a"}]', "a long number": b'{"prompt": ' + b"9" * 5000 + b"}",
    "messages an object": b'{"messages": {"role": "user", "content": "a"}}',
    "utf-16": b"\xff\xfea\0",
}  # fmt: skip


READ = ("a key twice", "a large id", "a negative id", "no ids")


@pytest.mark.parametrize("name", PROMPTS)
def test_odd_prompts_are_read_or_refused_by_file_and_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(PROMPTS[name] + b"\n")
    if name in READ:
        assert len(read_prompts_file(str(path), chat=False, system="")) == 1
        return
    with pytest.raises(UserError) as caught:
        read_prompts_file(str(path), chat=False, system="")
    assert str(caught.value).startswith(f"{path}, line 1")
    assert len(str(caught.value)) < 600
