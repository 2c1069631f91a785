"""300 random models of the three families: each runs, learns, and survives the way out and back."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import read_folder

from moe.config import DataConfig, RouterConfig, TrainConfig
from moe.convert.export_model import export_model
from moe.convert.hf_config import family_of
from moe.convert.import_model import import_model
from moe.load_run import load_run, open_run
from moe.model.transformer import Transformer, build_model
from moe.model_config import BlockSparseConfig, ModelConfig, RopeConfig
from moe.sparse.noise import token_keys
from moe.train.checkpoint import save_checkpoint

NUM_MODELS, NUM_PARTS = 300, 10
LENGTH = 14  # tokens: beyond the short original lengths, windows and blocks below


def random_model(dice: random.Random) -> tuple[ModelConfig, RouterConfig]:
    """Any small model that one of the three architectures can hold."""
    family = dice.choice(["phi3", "phimoe", "phi3small"])
    num_kv_heads, head_dim = dice.choice([1, 2, 3]), dice.choice([4, 8])
    num_heads = num_kv_heads * dice.choice([1, 2, 4])
    is_long = dice.random() < 0.5
    hidden = num_heads * head_dim
    if family == "phimoe" or (family == "phi3" and not is_long):
        hidden = dice.choice([hidden, 12])  # a head's width is not hidden / heads there
    shape: dict[str, Any] = {
        "vocab_size": dice.choice([24, 40]), "hidden_size": hidden, "head_dim": head_dim,
        "num_layers": dice.choice([1, 2]), "num_heads": num_heads, "num_kv_heads": num_kv_heads,
        "intermediate_size": dice.choice([3, 8]), "max_position": 32,
        "norm_eps": dice.choice([1e-5, 1e-6]), "tie_embeddings": dice.random() < 0.4,
    }  # fmt: skip
    fraction = dice.choice([1.0, 0.5]) if family == "phi3" else 1.0
    rope = RopeConfig(
        theta=dice.choice([1e4, 1e6]), original_max_position=32, rotary_fraction=fraction
    )
    if is_long:
        count, scale = int(head_dim * fraction) // 2, dice.uniform(0.9, 1.4)
        rope = dataclasses.replace(
            rope, original_max_position=dice.choice([8, 32]),
            short_factor=tuple(dice.uniform(1, 2) for _ in range(count)),
            long_factor=tuple(dice.uniform(1, 9) for _ in range(count)), short_mscale=scale,
            long_mscale=scale if family == "phi3" else dice.uniform(0.9, 1.4),
        )  # fmt: skip
    window, router = dice.choice([None, 2, 5, 100]), RouterConfig()
    if family == "phimoe":
        shape |= {
            "num_experts": dice.randint(2, 16), "attention_bias": dice.random() < 0.5,
            "head_bias": dice.random() < 0.5, "sliding_window": window,
        }  # fmt: skip
        router = RouterConfig(
            mask_threshold=dice.choice([0.01, 0.3]), input_jitter=dice.choice([0.0, 0.01]),
            balance="pooled",
        )  # fmt: skip
    elif family == "phi3":
        shape |= {
            "num_experts": 0, "norm": "rmsnorm", "attention_bias": False, "head_bias": False,
            "sliding_window": window, "embedding_dropout": dice.choice([0.0, 0.1]),
        }  # fmt: skip
    else:
        sparse = BlockSparseConfig(
            num_local_blocks=dice.choice([1, 2]), block_size=dice.choice([4, 8]),
            vertical_stride=dice.choice([2, 3]), is_same_for_all_heads=dice.random() < 0.5,
            dense_every=dice.choice([0, 1, 2]),
        )  # fmt: skip
        shape |= {
            "num_experts": 0, "head_bias": False, "feed_forward": "gegelu",
            "feed_forward_bias": True, "attention_scale": dice.choice([None, 1 / head_dim]),
            "embedding_multiplier": dice.choice([1.0, 10.0]),
            "logit_divisor": dice.choice([1.0, 8.0]), "masked_tokens": dice.choice([(), (0, 23)]),
            "feed_forward_dropout": dice.choice([0.0, 0.1]),
            "block_sparse": dice.choice([sparse, BlockSparseConfig()]),
        }  # fmt: skip
    return ModelConfig(**shape, rope=rope), router


def randomise(model: Transformer, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def check_gradients(model: Transformer, generator: torch.Generator) -> None:
    vocab_size = model.config.vocab_size
    tokens = torch.randint(1, vocab_size - 1, (2, LENGTH), generator=generator)
    keys = token_keys(0, torch.arange(2), seq_len=LENGTH)
    logits = model.train()(tokens, key_BS=keys).logits
    assert logits.isfinite().all()
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # a router whose every choice had one candidate alone learns nothing from it
        assert parameter.grad.any() or ".router." in name, name
        parameter.grad = None


def save(root: Path, model: Transformer, router: RouterConfig) -> Path:
    config = TrainConfig(model=model.config, router=router, data=DataConfig(seq_len=4))
    return save_checkpoint(
        root, 1, tensors={"model": {name: p.detach() for name, p in model.named_parameters()}},
        state={"train": {"step": 1, "tokens_seen": 0, "precision": "float32", "run_id": "x"}},
        extra_files={"config.json": json.dumps(dataclasses.asdict(config)).encode()}, keep_last=1,
    )  # fmt: skip


def quiet(*_: object) -> None:
    pass


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_a_random_model_runs_learns_and_comes_back_the_same(part, fast_folder):
    for number in range(part, NUM_MODELS, NUM_PARTS):
        dice, generator = random.Random(number), torch.Generator().manual_seed(number)
        model_config, router = random_model(dice)
        model = build_model(model_config, router)
        randomise(model, generator)
        check_gradients(model, generator)
        place = fast_folder / str(number)
        ours = save(place / "run", model, router)
        exported = export_model(
            open_run(str(ours), on_skip=pytest.fail), place / "hf", on_progress=quiet,
            window=dice.choice(["original", "transformers", None]), max_shard_bytes=4000,
        )  # fmt: skip
        assert exported.family == family_of(model_config)
        window = "transformers" if "transformers code counts" in card(place) else "original"
        done = import_model(
            place / "hf", place / "back", window=window, tokenizer=None, on_progress=quiet
        )
        assert dataclasses.replace(done.found.model, name=model_config.name) == model_config
        back = load_run(str(place / "back"), device=torch.device("cpu"), on_skip=pytest.fail)
        assert dataclasses.replace(back.model.config, name=model_config.name) == model_config
        expected = dict(model.named_parameters())
        got = dict(back.model.named_parameters())
        assert got.keys() == expected.keys()
        for name, parameter in expected.items():
            assert torch.equal(got[name], parameter), name
        export_model(
            open_run(str(place / "back"), on_skip=pytest.fail), place / "again",
            window=None, max_shard_bytes=10**9, on_progress=quiet,
        )  # fmt: skip
        assert read_folder(place / "again") == read_folder(place / "hf")


def card(place: Path) -> str:
    return (place / "hf" / "README.md").read_text()
