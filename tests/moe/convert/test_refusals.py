"""What a conversion refuses: one message with file and key, and nothing left on the disk."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published_folders import CONFIGS, SHAPES, random_tensors, write_file, write_folder

from moe.config import RouterConfig, TrainConfig
from moe.convert.export_model import export_model
from moe.convert.import_model import import_model
from moe.errors import CheckpointError, ConfigError, DataError, UserError
from moe.load_run import OpenedRun, open_run
from moe.train.checkpoint import save_checkpoint

MOE = CONFIGS["phimoe"]
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


def quiet(*_: object) -> None:
    pass


def refused(
    tmp_path: Path,
    tensors: dict[str, np.ndarray],
    *says: str,
    config: dict[str, Any] = MOE,
    error: type[Exception] = CheckpointError,
    tokenizer: Path | None = None,
) -> None:
    for number, num_shards in enumerate((1, 3)):
        source = write_folder(tmp_path / f"hf{number}", config, tensors, num_shards=num_shards)
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(error) as caught:
            import_model(
                source, tmp_path / "new" / "ours", window="original", tokenizer=tokenizer,
                on_progress=quiet,
            )  # fmt: skip
        for text in says:
            assert text in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(SHAPES["phimoe"](MOE))


def test_the_tensors_of_these_tests_are_right(tensors, tmp_path):
    source = write_folder(tmp_path / "hf", MOE, tensors)
    import_model(source, tmp_path / "ours", window="original", tokenizer=None, on_progress=quiet)
    assert (tmp_path / "ours" / "manifest.json").is_file()


def test_a_missing_tensor_is_named(tensors, tmp_path):
    del tensors[EXPERT]
    refused(tmp_path, tensors, "1 tensor(s)", EXPERT, "not there")


def test_many_missing_tensors_are_counted(tensors, tmp_path):
    few = dict(list(tensors.items())[:6])
    refused(tmp_path, few, f"{len(tensors) - 6} tensor(s)", f"and {len(tensors) - 10} more")


def test_an_unexpected_tensor_is_named_with_the_nearest_known_one(tensors, tmp_path):
    tensors["model.norm.weigth"] = tensors["model.norm.weight"]
    refused(tmp_path, tensors, "model.norm.weigth", "Did you mean 'model.norm.weight'?")


def test_a_misspelt_tensor_is_missing_with_the_spelling_found(tensors, tmp_path):
    tensors["lm_head.bais"] = tensors.pop("lm_head.bias")
    refused(tmp_path, tensors, "lm_head.bias", "Did you mean 'lm_head.bais'?")


@pytest.mark.parametrize("shape", [(32, 24), (24, 31), (24, 32, 1), (768,)])
def test_a_wrong_shape_is_named_with_the_right_one(tensors, tmp_path, shape):
    tensors[EXPERT] = np.ones(shape, np.float32)
    refused(tmp_path, tensors, EXPERT, str(list(shape)), "[24, 32]", ".safetensors")


def test_a_type_that_is_no_weight_is_refused(tensors, tmp_path):
    tensors[EXPERT] = np.ones((24, 32), np.int64)
    refused(tmp_path, tensors, EXPERT, "is I64; allowed: BF16, F16, F32")


def test_parts_of_one_tensor_with_several_types_are_refused(tensors, tmp_path):
    tensors[EXPERT] = tensors[EXPERT].astype(np.float16)
    refused(tmp_path, tensors, "blocks.1.feed_forward.experts.gate_up", "F16", "F32", EXPERT)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (-np.inf, "infinite")])
def test_a_value_that_is_not_finite_is_named_with_its_place(tensors, tmp_path, value, word):
    tensors[EXPERT][23, 31] = value
    refused(tmp_path, tensors, f"{EXPERT}[23, 31] is {word}", ".safetensors")


def test_a_tied_head_that_differs_is_refused(tmp_path):
    config = CONFIGS["phi3 tied"]
    tensors = random_tensors(SHAPES["phi3"](config))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][95, 31] += 1
    refused(tmp_path, tensors, "lm_head.weight differs", "tie_word_embeddings", config=config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:95]
    refused(tmp_path / "b", tensors, "lm_head.weight has the shape [95, 32]", config=config)


def test_a_configuration_of_another_model_is_refused(tensors, tmp_path):
    refused(tmp_path, tensors, "have no place", config={**MOE, "num_local_experts": 2})
    unknown = {**MOE, "model_type": "llama"}
    refused(tmp_path / "b", tensors, "model_type", config=unknown, error=ConfigError)


def test_a_rotary_buffer_is_the_only_name_that_is_passed_over(tensors, tmp_path):
    tensors["model.layers.0.self_attn.inv_freq"] = np.ones(4, np.float32)
    refused(tmp_path, tensors, "model.layers.0.self_attn.inv_freq")


def test_a_tokenizer_that_is_none_is_refused(tensors, tmp_path):
    (tmp_path / "t").write_text("not one")
    refused(tmp_path, tensors, str(tmp_path / "t"), error=DataError, tokenizer=tmp_path / "t")
    missing = tmp_path / "u"
    refused(tmp_path / "b", tensors, "is missing", "tokenizer=FILE", tokenizer=missing)


def test_a_target_that_holds_something_is_left_alone(tensors, tmp_path):
    source = write_folder(tmp_path / "hf", MOE, tensors)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "x").write_text("1")
    with pytest.raises(ConfigError, match="holds files already"):
        import_model(
            source, tmp_path / "ours", window="original", tokenizer=None, on_progress=quiet
        )
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["x"]


@pytest.mark.parametrize("phase", ["MiB checked", "MiB written"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_ctrl_c_at_any_time_leaves_nothing(tensors, tmp_path, phase, error):
    source = write_folder(tmp_path / "hf", MOE, tensors)

    def stop(now: str, done: int, total: int) -> None:
        if now == phase:
            raise error

    with pytest.raises(error):
        import_model(
            source, tmp_path / "a" / "ours", window="original", tokenizer=None, on_progress=stop
        )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_source_that_changes_between_the_check_and_the_copy_is_refused(tensors, tmp_path):
    source = write_folder(tmp_path / "hf", MOE, tensors)

    def change(now: str, done: int, total: int) -> None:
        if now == "MiB written":
            write_file(source / "model.safetensors", {**tensors, EXPERT: tensors[EXPERT] * 2})

    with pytest.raises(CheckpointError, match="changed it while it was read"):
        import_model(
            source, tmp_path / "ours", window="original", tokenizer=None, on_progress=change
        )
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def saved(root: Path, *, spoil: dict[str, torch.Tensor] | None = None, **changes: Any) -> OpenedRun:
    from dataclasses import asdict

    from moe.model.transformer import build_model

    config = TrainConfig()
    small = replace(
        config.model, vocab_size=96, hidden_size=32, num_layers=1, num_heads=4, num_kv_heads=2,
        head_dim=8, intermediate_size=24, num_experts=4, max_position=512,
    )  # fmt: skip
    router = changes.pop("router", config.router)
    config = replace(config, model=replace(small, **changes), router=router)
    model = build_model(config.model, config.router)
    tensors = {name: p.detach() for name, p in model.named_parameters()} | (spoil or {})
    step = save_checkpoint(
        root, 5, tensors={"model": tensors}, keep_last=1,
        state={"train": {"step": 5, "tokens_seen": 9, "precision": "float32", "run_id": "x"}},
        extra_files={"config.json": json.dumps(asdict(config)).encode()},
    )  # fmt: skip
    return open_run(str(step), on_skip=pytest.fail)


def export(opened: OpenedRun, target: Path) -> None:
    export_model(opened, target, window=None, max_shard_bytes=10**9, on_progress=quiet)


def test_the_run_of_these_tests_can_be_exported(tmp_path):
    export(saved(tmp_path / "run"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "step 5, 9 tokens seen" in card
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_model_without_a_published_architecture_is_refused_by_its_key(tmp_path):
    for number, (key, changes) in enumerate(
        {
            "router.name": {"router": RouterConfig(name="topk")},
            "model.norm": {"norm": "rmsnorm"},
        }.items()
    ):
        with pytest.raises(ConfigError, match=f"^{key}: "):
            export(saved(tmp_path / f"run{number}", **changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_run_whose_values_are_not_finite_is_refused(tmp_path):
    weight = torch.ones(32)
    weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"norm\.weight\[3\] is NaN"):
        export(saved(tmp_path / "run", spoil={"norm.weight": weight}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_whose_tensors_are_not_those_of_its_configuration_is_refused(tmp_path):
    # as many numbers in another shape; another number of them is refused when the run is opened
    with pytest.raises(CheckpointError, match=r"norm\.weight has the shape \[32, 1\]"):
        export(saved(tmp_path / "run", spoil={"norm.weight": torch.ones(32, 1)}), tmp_path / "out")
    for name in ("norm.weight", "extra"):
        with pytest.raises(CheckpointError, match="describes a model of 18,944 parameters"):
            export(saved(tmp_path / name, spoil={name: torch.ones(31)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_300_damaged_files_give_one_message_or_a_finite_model(tensors, fast_folder):
    """Bytes changed, cut or doubled anywhere in a folder's files: a UserError, or all is read."""
    dice = random.Random(5)
    source = write_folder(fast_folder / "hf", MOE, tensors, num_shards=2)
    whole = {path.name: path.read_bytes() for path in source.iterdir()}
    messages: list[str] = []
    leftovers = 0
    for number in range(300):
        name = dice.choice(sorted(whole))
        raw = bytearray(whole[name])
        # half of the places in the headers, which are a small part of the files
        place = dice.randrange(min(len(raw), 4000) if dice.random() < 0.5 else len(raw))
        kind = dice.choice(["flip", "cut", "double", "digit"])
        if kind == "flip":
            raw[place] ^= 1 << dice.randrange(8)
        elif kind == "cut":
            del raw[place:]
        elif kind == "double":
            raw[place:place] = raw[place : place + dice.randrange(1, 64)]
        else:
            raw[place] = dice.choice(b'0123456789-[]{}",:')
        (source / name).write_bytes(raw)
        target = fast_folder / f"ours{number}"
        try:
            import_model(source, target, window="original", tokenizer=None, on_progress=quiet)
        except UserError as error:
            messages.append(str(error))
            leftovers += target.exists()
        (source / name).write_bytes(whole[name])
    assert 100 < len(messages) < 300
    assert leftovers == 0
    assert max(map(len, messages)) < 2000


def test_numbers_of_64_bits_are_not_called_quantised(tensors, tmp_path):
    double = tensors | {EXPERT: tensors[EXPERT].astype(np.float64)}
    refused(tmp_path, double, EXPERT, "is F64", "Save the model again in float32")


def test_a_broken_template_file_is_the_one_that_is_named(tensors, tmp_path):
    source = write_folder(tmp_path / "hf", MOE, tensors)
    (source / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(CheckpointError, match=r"hf/chat_template\.jinja: "):
        import_model(
            source, tmp_path / "ours", window="original", tokenizer=None, on_progress=quiet
        )
