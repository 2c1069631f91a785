"""Which tokenizer a converted model has: its own, the one that is given, or none."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
import torch
from published_folders import CONFIGS, SHAPES, random_tensors, write_folder

from moe.convert.chat_template_text import TEXTS
from moe.convert.export_model import export_model
from moe.convert.import_model import Imported, import_model
from moe.convert.tokenizer_files import hugging_face_tokenizer_files
from moe.data.load_tokenizer import load_tokenizer
from moe.errors import DataError
from moe.load_run import LoadedRun, load_run, open_run
from moe.text_habits import begins_with_bos

TEMPLATE = TEXTS["phi3"]


def quiet(*_: object) -> None:
    pass


@pytest.fixture
def ranks(tmp_path) -> Path:
    """A ranks file of the 256 bytes and two merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc"]
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "small.tiktoken").write_bytes(b"".join(lines))
    return tmp_path / "small.tiktoken"


def published(folder: Path, name: str) -> Path:
    config = {**CONFIGS[name], "vocab_size": 576}
    return write_folder(folder, config, random_tensors(SHAPES[config["model_type"]](config)))


def into_ours(source: Path, target: Path, tokenizer: Path | None = None) -> Imported:
    return import_model(source, target, window="original", tokenizer=tokenizer, on_progress=quiet)


def into_theirs(source: Path, target: Path) -> None:
    opened = open_run(str(source), on_skip=pytest.fail)
    export_model(opened, target, window=None, max_shard_bytes=10**9, on_progress=quiet)


def load(folder: Path) -> LoadedRun:
    return load_run(str(folder), device=torch.device("cpu"), on_skip=pytest.fail)


def test_phi_3_small_takes_a_ranks_file_that_is_given(tmp_path, ranks):
    done = into_ours(published(tmp_path / "hf", "phi3small"), tmp_path / "ours", ranks)
    assert done.has_tokenizer
    run = load(tmp_path / "ours")
    assert run.require_tokenizer().encode("abcab") == [257, 256]
    assert run.config.tokenizer.chat_template == "phi3_small"


def test_a_ranks_file_of_the_folder_is_used_and_given_back_under_its_name(tmp_path, ranks):
    source = published(tmp_path / "hf", "phi3small")
    shutil.copy(ranks, source / "cl100k_base.tiktoken")
    (source / "tokenizer_config.json").write_text("{}")
    into_ours(source, tmp_path / "ours")
    assert load(tmp_path / "ours").require_tokenizer().encode("ab") == [256]
    into_theirs(tmp_path / "ours", tmp_path / "back")
    given = (tmp_path / "back/cl100k_base.tiktoken").read_bytes()
    assert given == ranks.read_bytes()
    assert not (tmp_path / "back/tokenizer.model").exists()


def test_a_sentencepiece_file_and_its_template_are_kept(tmp_path, short_documents):
    source = published(tmp_path / "hf", "phimoe")
    shutil.copy(short_documents / "tokenizer.model", source)
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    done = into_ours(source, tmp_path / "ours")
    assert done.notes == ()
    run = load(tmp_path / "ours")
    assert run.config.tokenizer.chat_template == "phi3"
    tokenizer = run.require_tokenizer()
    assert tokenizer.decode(tokenizer.encode("some text")) == "some text"
    into_theirs(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_a_template_beside_the_configuration_counts_too(tmp_path, short_documents):
    source = published(tmp_path / "hf", "phimoe")
    shutil.copy(short_documents / "tokenizer.model", source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    into_ours(source, tmp_path / "ours")
    assert load(tmp_path / "ours").config.tokenizer.chat_template == "phi3"


def test_a_given_tokenizer_comes_before_the_folders_which_is_given_back(
    tmp_path, ranks, short_documents
):
    source = published(tmp_path / "hf", "phimoe")
    shutil.copy(short_documents / "tokenizer.model", source)
    into_ours(source, tmp_path / "ours", ranks)
    assert load(tmp_path / "ours").require_tokenizer().encode("ab") == [256]
    into_theirs(tmp_path / "ours", tmp_path / "back")
    given = (tmp_path / "back/tokenizer.model").read_bytes()
    assert given == (short_documents / "tokenizer.model").read_bytes()


def test_an_odd_tokenizer_of_a_folder_is_kept_with_a_note_and_given_back(tmp_path):
    source = published(tmp_path / "hf", "phimoe")
    (source / "tokenizer.model").write_bytes(b"something else")
    done = into_ours(source, tmp_path / "ours")
    assert not done.has_tokenizer
    assert "kept but cannot be used" in done.notes[0]
    into_theirs(tmp_path / "ours", tmp_path / "back")
    assert (tmp_path / "back/tokenizer.model").read_bytes() == b"something else"


def test_a_model_without_one_says_what_to_do_when_text_is_asked_for(tmp_path):
    into_ours(published(tmp_path / "hf", "phimoe"), tmp_path / "ours")
    run = load(tmp_path / "ours")
    assert run.tokenizer is None
    with pytest.raises(DataError, match=r"^run: .*tokenizer=FILE"):
        run.require_tokenizer()


def test_a_given_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tmp_path, ranks):
    config = CONFIGS["phi3small"]
    source = write_folder(tmp_path / "hf", config, random_tensors(SHAPES["phi3small"](config)))
    with pytest.raises(DataError, match="vocab_size"):
        into_ours(source, tmp_path / "ours", ranks)
    assert not (tmp_path / "ours").exists()


def with_words(folder: Path, short_documents: Path, *words: str) -> Path:
    """A published folder with our own tokenizer's files, and words added as a fine-tune adds."""
    source = published(folder, "phimoe")
    tokenizer = load_tokenizer(short_documents / "tokenizer.model")
    files = hugging_face_tokenizer_files(
        tokenizer, chat_template="phi3", max_length=64, adds_bos=True
    )
    for name, content in files.items():
        (source / name).write_bytes(content)
    whole = json.loads(files["tokenizer.json"])
    named = json.loads(files["added_tokens.json"])
    for place, word in enumerate(words):
        number = max(tokenizer.special_ids.values()) + 1 + place
        whole["added_tokens"].append(whole["added_tokens"][-1] | {"id": number, "content": word})
        named[word] = number
    (source / "tokenizer.json").write_text(json.dumps(whole))
    (source / "added_tokens.json").write_text(json.dumps(named))
    return source


def test_a_folder_with_tokenizer_json_alone_keeps_its_tokenizer(tmp_path, short_documents):
    source = with_words(tmp_path / "hf", short_documents)
    (source / "tokenizer.model").unlink()
    done = into_ours(source, tmp_path / "ours")
    assert (done.has_tokenizer, done.notes) == (True, ())
    run = load(tmp_path / "ours")
    expected = load_tokenizer(short_documents / "tokenizer.model")
    text = "some text <|user|>"
    assert run.require_tokenizer().encode(text) == expected.encode(text)
    assert begins_with_bos(run.checkpoint)
    into_theirs(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back/tokenizer.model").exists()
    given = (tmp_path / "back/tokenizer.json").read_bytes()
    assert given == (source / "tokenizer.json").read_bytes()


def test_words_that_tokenizer_model_does_not_have_are_read_from_tokenizer_json(
    tmp_path, short_documents
):
    source = with_words(tmp_path / "hf", short_documents, "<|tool|>", "<think>")
    done = into_ours(source, tmp_path / "ours")
    assert (done.has_tokenizer, done.notes) == (True, ())
    tokenizer = load(tmp_path / "ours").require_tokenizer()
    ids = tokenizer.encode("<|tool|> x <think>")
    assert (ids[0], ids[-1]) == (tokenizer.special_ids["<|tool|>"], max(ids))
    assert tokenizer.decode(ids) == "<|tool|> x <think>"
    into_theirs(tmp_path / "ours", tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer.model", "added_tokens.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name


def test_words_that_no_file_lets_us_read_are_named(tmp_path, short_documents):
    source = with_words(tmp_path / "hf", short_documents, "<|tool|>", "<think>")
    (source / "tokenizer.json").unlink()
    (note,) = into_ours(source, tmp_path / "ours").notes
    assert "tokenizer.model does not have: <|tool|> (512), <think> (513)" in note
    assert load(tmp_path / "ours").tokenizer is None
    done = into_ours(source, tmp_path / "again", source / "tokenizer.model")  # asked for
    assert done.has_tokenizer
    assert "text will not hold them" in done.notes[0]


def test_the_note_names_the_files_found_and_the_files_wanted(tmp_path, short_documents):
    source = published(tmp_path / "hf", "phimoe")
    (source / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece"}}))
    (note,) = into_ours(source, tmp_path / "ours").notes
    assert "tokenizer.json: has no model with a vocab" in note
    assert "give the SentencePiece tokenizer.model" in note
    (source / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (source / name).write_text("")
    (note,) = into_ours(source, tmp_path / "again").notes
    assert note.startswith("no tokenizer was found: wanted tokenizer.model, ")
    assert "(found: merges.txt, vocab.json)" in note


def test_a_run_whose_tokenizer_is_a_json_is_exported_with_it(tmp_path, short_documents):
    source = with_words(tmp_path / "hf", short_documents, "<think>")
    tokenizer = load_tokenizer(source / "tokenizer.json")
    files = hugging_face_tokenizer_files(
        tokenizer, chat_template="phi35", max_length=64, adds_bos=True
    )
    assert "tokenizer.model" not in files
    assert json.loads(files["tokenizer.json"]) == json.loads(tokenizer.model_bytes())
    decoder = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert decoder["512"]["content"] == "<think>"
