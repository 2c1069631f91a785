"""Every tiny model of conf/model goes out and back; what it computes is what was published."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from published_folders import SHAPES, random_tensors, read_folder, write_folder

from moe.config import DataConfig, RouterConfig, TokenizerConfig, TrainConfig
from moe.config_from_dict import from_dict
from moe.convert.export_files import export_files
from moe.convert.export_model import export_model
from moe.convert.hf_config import family_of, to_hf_config
from moe.convert.import_model import import_model
from moe.load_run import LoadedRun, load_run, open_run
from moe.model.transformer import build_model
from moe.model_config import ModelConfig, RopeConfig
from moe.train.checkpoint import save_checkpoint

TESTS = Path(__file__).parents[2]
sys.path.insert(0, str(TESTS / "parity"))
import phi3_small_formulas  # noqa: E402 - found through the line above

TINY = {
    path.stem: from_dict(ModelConfig, yaml.safe_load(path.read_text()))
    for path in sorted((TESTS.parent / "conf/model").glob("*_tiny.yaml"))
}
NATIVE = [name for name, model in TINY.items() if family_of(model) != "phi3small"]
SMALL = [name for name, model in TINY.items() if family_of(model) == "phi3small"]


def quiet(*_: object) -> None:
    pass


def published(folder: Path, name: str, *, num_shards: int = 1) -> Path:
    values = to_hf_config(TINY[name], RouterConfig(), dtype="float32", window="transformers")
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tensors = random_tensors(SHAPES[values["model_type"]](values))
    return write_folder(folder, values, tensors, num_shards=num_shards)


def out_and_back(source: Path, folder: Path) -> LoadedRun:
    """Import source to folder/ours, export that to folder/back, and load ours."""
    import_model(source, folder / "ours", window="transformers", tokenizer=None, on_progress=quiet)
    export_model(
        open_run(str(folder / "ours"), on_skip=pytest.fail), folder / "back", window=None,
        max_shard_bytes=10**9, on_progress=quiet,
    )  # fmt: skip
    return load_run(str(folder / "ours"), device=torch.device("cpu"), on_skip=pytest.fail)


def test_all_tiny_models_of_the_family_are_here():
    assert len(TINY) >= 10
    assert len(SMALL) >= 2


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_comes_back_byte_for_byte(tmp_path, name, num_shards):
    source = published(tmp_path / "hf", name, num_shards=num_shards)
    run = out_and_back(source, tmp_path)
    assert read_folder(tmp_path / "back") == read_folder(source)
    assert (tmp_path / "back/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert replace(run.config.model, name=name) == TINY[name]


@pytest.mark.parametrize("name", NATIVE)
def test_transformers_computes_the_same_from_the_exported_folder(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    ours = out_and_back(published(tmp_path / "hf", name), tmp_path).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype="auto", attn_implementation="eager"
    ).eval()
    # beyond windows and original lengths, but for phimoe's, where transformers 5.23 is wrong
    length = 100 if TINY[name].is_sparse and TINY[name].rope.long_factor else 160
    tokens = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs(tokens).logits, ours(tokens).logits
        assert (expected - got).abs().max() < 1e-5 * expected.abs().max()
        written = theirs.generate(
            tokens[:, :40], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    from moe.generate import generate
    from moe.inference_config import Sampling

    greedy = Sampling(max_new_tokens=24, temperature=0.0)
    new = list(generate(ours, tokens[0, :40].tolist(), greedy, stop_ids=()))
    assert new == written[0, 40:].tolist()


@pytest.mark.parametrize("name", SMALL)
def test_phi_3_small_computes_its_formulas_on_the_published_tensors(tmp_path, name):
    source = published(tmp_path / "hf", name)
    ours = out_and_back(source, tmp_path).model
    model = TINY[name]
    parameters = {
        key: torch.from_numpy(np.frombuffer(raw, np.float32).reshape(shape).astype(np.float64))
        for key, (_, shape, raw) in read_folder(source).items()
    }
    sparse, rope = model.block_sparse, model.rope
    shape = phi3_small_formulas.Shape(
        vocab_size=model.vocab_size, hidden_size=model.hidden_size, num_layers=model.num_layers,
        num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, head_dim=model.head_dim,
        intermediate_size=model.intermediate_size, block_size=sparse.block_size,
        num_local_blocks=sparse.num_local_blocks, vert_stride=sparse.vertical_stride,
        dummy_tokens=model.masked_tokens, original_max_position=rope.original_max_position,
        short_factor=rope.short_factor, long_factor=rope.long_factor,
        short_mscale=rope.short_mscale, long_mscale=rope.long_mscale,
    )  # fmt: skip
    tokens = torch.randint(512, (1, 160), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = phi3_small_formulas.logits(parameters, tokens, shape), ours(tokens).logits
    real = [token for token in range(model.vocab_size) if token not in model.masked_tokens]
    expected, got = expected[..., real], got[..., real].double()
    assert expected.std() > 0.1
    assert (expected - got).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("vocab_size", "is_small", "ids"),
    [
        (32_064, False, {"bos_token_id": 1, "eos_token_id": [32_000, 32_001, 32_007],
                         "pad_token_id": 32_000}),
        (100_352, True, {"bos_token_id": 100_257, "eos_token_id": [100_257, 100_266],
                         "pad_token_id": 100_257}),
        (512, False, None),
    ],
)  # fmt: skip
def test_an_exported_model_stops_where_its_vocabulary_says(tmp_path, vocab_size, is_small, ids):
    shape = replace(
        TINY["phi3_small_8k_tiny" if is_small else "phi35_moe_tiny"], vocab_size=vocab_size,
        hidden_size=8, num_heads=2, num_kv_heads=1, head_dim=4, num_layers=1, masked_tokens=(),
        max_position=64, rope=RopeConfig(original_max_position=64),
    )  # fmt: skip
    config = TrainConfig(
        model=shape, data=DataConfig(seq_len=8), tokenizer=TokenizerConfig(vocab_size=512)
    )
    model = build_model(config.model, config.router, device="meta")
    tensors = {name: torch.zeros(value.shape) for name, value in model.named_parameters()}
    folder = save_checkpoint(
        tmp_path / "run", 3, tensors={"model": tensors}, keep_last=1,
        state={"train": {"step": 3, "tokens_seen": 1, "precision": "float32", "run_id": "x"}},
        extra_files={"config.json": json.dumps(asdict(config)).encode()},
    )  # fmt: skip
    files = export_files(
        open_run(str(folder), on_skip=pytest.fail), dtype="float32", window="original"
    )
    assert ("generation_config.json" in files) == (ids is not None)
    if ids is not None:
        assert json.loads(files["generation_config.json"]) == ids
