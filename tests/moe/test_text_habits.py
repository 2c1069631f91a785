"""How texts begin and end: a run of ours, and converted models with and without their files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from moe.config import TrainConfig
from moe.errors import CheckpointError
from moe.load_run import LoadedRun, load_run
from moe.model.transformer import build_model
from moe.model_config import ModelConfig
from moe.text_habits import begins_with_bos, stop_ids
from moe.train.checkpoint import save_checkpoint

NANO = ModelConfig(
    vocab_size=512, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=8, num_experts=0,
)  # fmt: skip


def load(folder: Path, files: dict[str, object], *, tokenizer: Path | None = None) -> LoadedRun:
    model = build_model(NANO)
    extra = {name: json.dumps(value).encode() for name, value in files.items()}
    extra["config.json"] = json.dumps(dataclasses.asdict(TrainConfig(model=NANO))).encode()
    if tokenizer is not None:
        extra["tokenizer.model"] = tokenizer.read_bytes()
    saved = save_checkpoint(
        folder, 0, tensors={"model": dict(model.named_parameters())}, extra_files=extra,
        state={"train": {"precision": "float32"}}, keep_last=1,
    )  # fmt: skip
    return load_run(str(saved), device=torch.device("cpu"), on_skip=pytest.fail)


@pytest.fixture(scope="module")
def tokenizer(short_documents) -> Path:
    return short_documents / "tokenizer.model"


def test_a_run_of_ours_begins_with_bos_and_ends_as_its_tokenizer_says(tokenizer, tmp_path):
    run = load(tmp_path, {}, tokenizer=tokenizer)
    assert run.tokenizer is not None
    assert begins_with_bos(run.checkpoint)
    assert stop_ids(run) == tuple(sorted(run.tokenizer.stop_ids)) != ()


@pytest.mark.parametrize(("flags", "expected"), [
    ({}, False), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True), (None, False),
])  # fmt: skip
def test_a_published_model_begins_as_its_tokenizer_config_says(flags, expected, tmp_path):
    files: dict[str, object] = {"hf_config.json": {}}
    if flags is not None:
        files["hf_tokenizer_config.json"] = flags
    assert begins_with_bos(load(tmp_path, files).checkpoint) is expected


_BOS_TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
}
_PLAIN_TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}
_BYTES = {"type": "ByteLevel"}


@pytest.mark.parametrize(("flags", "post_processor", "expected"), [
    ({}, _BOS_TEMPLATE, True), ({}, _PLAIN_TEMPLATE, False), ({}, None, False), ({}, [], False),
    ({}, {"type": "Sequence", "processors": [_BYTES, _BOS_TEMPLATE]}, True),
    ({}, {"type": "Sequence", "processors": [_BYTES, _PLAIN_TEMPLATE]}, False),
    ({"add_bos_token": None}, _BOS_TEMPLATE, True),
    ({"add_bos_token": False}, _BOS_TEMPLATE, False),  # the flag is given: transformers obeys it
    ({"add_bos_token": True}, None, True),
])  # fmt: skip
def test_where_no_flag_is_given_the_template_of_tokenizer_json_decides(
    flags, post_processor, expected, tmp_path
):
    files: dict[str, object] = {
        "hf_config.json": {}, "hf_tokenizer_config.json": flags,
        "hf_tokenizer.json": {"post_processor": post_processor},
    }  # fmt: skip
    assert begins_with_bos(load(tmp_path, files).checkpoint) is expected


@pytest.mark.parametrize(("named", "expected"), [
    ([500, 3], (3, 500)), (7, (7,)), (None, ()),
])  # fmt: skip
def test_a_model_without_tokenizer_stops_where_its_generation_config_says(
    named, expected, tmp_path
):
    files = {"hf_config.json": {}, "hf_generation_config.json": {"eos_token_id": named}}
    assert stop_ids(load(tmp_path, files)) == expected


def test_both_lists_of_stop_tokens_count_and_no_file_is_no_stop_token(tokenizer, tmp_path):
    files = {"hf_config.json": {}, "hf_generation_config.json": {"eos_token_id": 3}}
    run = load(tmp_path / "a", files, tokenizer=tokenizer)
    assert run.tokenizer is not None
    assert set(stop_ids(run)) == {3, *run.tokenizer.stop_ids}
    assert stop_ids(load(tmp_path / "b", {"hf_config.json": {}})) == ()


@pytest.mark.parametrize(("name", "value", "words"), [
    ("hf_generation_config.json", {"eos_token_id": ["x"]}, r"eos_token_id is \['x'\]"),
    ("hf_generation_config.json", {"eos_token_id": True}, "eos_token_id is"),
    ("hf_generation_config.json", [], "no JSON object"),
])  # fmt: skip
def test_a_broken_file_is_named(name, value, words, tmp_path):
    run = load(tmp_path, {"hf_config.json": {}, name: value})
    with pytest.raises(CheckpointError, match=rf"{name}.*{words}"):
        stop_ids(run)
