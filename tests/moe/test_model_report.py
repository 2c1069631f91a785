"""Memory formulas against what torch really keeps, allocates and has alive at once."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe.config import ExpertsConfig, RouterConfig
from moe.config_from_dict import from_dict
from moe.model.attention import KeyValueCache
from moe.model.transformer import Transformer, build_model
from moe.model_config import ModelConfig
from moe.model_flops import block_pattern
from moe.model_report import cache_size, inference_activations, training_activations
from moe.sparse.noise import token_keys
from moe.train.cross_entropy import cross_entropy

MODELS = Path(__file__).parents[2] / "conf/model"
TINY = ["phi3_mini_4k_tiny", "phi3_medium_4k_tiny", "phi3_small_8k_tiny", "grin_moe_tiny"]


def tiny(name: str, **changes: Any) -> ModelConfig:
    values: Any = OmegaConf.to_container(OmegaConf.load(MODELS / f"{name}.yaml"))
    return dataclasses.replace(from_dict(ModelConfig, values), **changes)


def storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def kept_bytes(model: Transformer, *, batch_size: int, seq_len: int, precision: torch.dtype) -> int:
    """Bytes that autograd keeps for the backward pass of a training step, each storage once."""
    parameters, kept = storages(model.parameters()), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # the tensor too: memory that is freed would be given out again, under the same address
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.randint(0, 500, (batch_size, seq_len))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            logits = model(
                tokens,
                key_BS=token_keys(0, torch.arange(batch_size), seq_len=seq_len),
                document_BS=torch.zeros_like(tokens),
            ).logits
        cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignored=-100).sum()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_a_training_step_keeps_what_the_formula_says_within_a_percent(
    name: str, precision: torch.dtype
) -> None:
    config = tiny(name)
    model = build_model(config, RouterConfig(), ExpertsConfig("grouped_mm"), seed=0).train()
    kept = kept_bytes(model, batch_size=2, seq_len=256, precision=precision)
    dtype = str(precision).removeprefix("torch.")
    table = training_activations(config, RouterConfig(), batch_size=2, seq_len=256, dtype=dtype)
    assert sum(table.values()) == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"head_dim": 24}, {"intermediate_size": 40}])
def test_the_formula_holds_for_other_shapes(change: dict[str, int]) -> None:
    for name in ("phi3_medium_4k_tiny", "grin_moe_tiny"):
        config = tiny(name, **change)
        model = build_model(config, RouterConfig(), ExpertsConfig("grouped_mm"), seed=0).train()
        kept = kept_bytes(model, batch_size=3, seq_len=96, precision=torch.float32)
        table = training_activations(
            config, RouterConfig(), batch_size=3, seq_len=96, dtype="float32"
        )
        assert sum(table.values()) == pytest.approx(kept, rel=0.015)


@pytest.mark.parametrize("name", TINY)
def test_activation_checkpointing_keeps_the_layers_inputs_and_one_layer(name: str) -> None:
    config = tiny(name)
    model = build_model(
        config, RouterConfig(), ExpertsConfig("grouped_mm"), seed=0, recompute_activations=True
    ).train()
    kept = kept_bytes(model, batch_size=2, seq_len=256, precision=torch.float32)
    table, whole = (
        training_activations(
            config, RouterConfig(), batch_size=2, seq_len=256, dtype="float32", recompute=recompute
        )
        for recompute in (True, False)
    )
    # the layer that is computed again is not there yet when the forward pass ends
    one_layer = {part: size for part, size in table.items() if part.endswith(", one layer")}
    assert sum(table.values()) - sum(one_layer.values()) == pytest.approx(kept, rel=0.015)
    in_layers = sum(whole[part.removesuffix(", one layer")] for part in one_layer)
    assert sum(one_layer.values()) >= in_layers / config.num_layers
    assert sum(table.values()) < sum(whole.values())


def test_without_jitter_the_router_keeps_its_input_once() -> None:
    config = tiny("grin_moe_tiny")
    sizes = [
        training_activations(config, router, batch_size=1, seq_len=64, dtype="float32")["router"]
        for router in (RouterConfig(), RouterConfig(input_jitter=0.0))
    ]
    assert sizes[0] - sizes[1] == config.num_layers * 64 * 4 * config.hidden_size


class Alive(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive at the same time."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.most = self.now = 0
        self._held = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or size == 0:
            return
        self._held.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._held.discard(key)
        self.now -= size


@pytest.mark.parametrize("last_only", [True, False])
@pytest.mark.parametrize("name", [*TINY, "tiny_moe", "tiny_dense"])
def test_a_pass_without_gradients_needs_about_what_the_formula_says(
    name: str, last_only: bool
) -> None:
    config = tiny(name)
    model = build_model(config, RouterConfig(), ExpertsConfig("grouped_mm"), seed=0).eval()
    tokens = torch.randint(0, 500, (4, 120))
    with torch.no_grad(), Alive([*model.parameters(), tokens]) as alive:
        model(tokens, last_only=last_only)
    expected = inference_activations(
        config, batch_size=4, seq_len=120, dtype="float32", last_only=last_only
    )
    assert expected == pytest.approx(alive.most, rel=0.1)


@pytest.mark.parametrize("name", ["phi3_small_8k_tiny", "phi3_mini_4k_tiny", "phi35_moe_tiny"])
def test_the_cache_that_is_allocated_is_the_one_of_generation(name: str) -> None:
    config = tiny(name)
    caches = KeyValueCache.empty(
        config, batch=3, length=200, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    size = cache_size(config, batch_size=3, seq_len=200, dtype="bfloat16")
    assert size.allocated == sum(c.key.nbytes + c.value.nbytes for c in caches)
    assert 0 < size.needed <= size.allocated


@pytest.mark.parametrize("seq_len", [1, 8, 9, 31, 33, 100, 256])
def test_a_sparse_cache_needs_the_places_that_the_last_query_sees(seq_len: int) -> None:
    for changes in ({}, {"num_heads": 6, "num_kv_heads": 3}, {"num_kv_heads": 8}):
        config = tiny("phi3_small_8k_tiny", **changes)
        pattern, group = block_pattern(config), config.num_heads // config.num_kv_heads
        place, query = torch.arange(seq_len), torch.tensor([[seq_len - 1]])
        seen = torch.zeros(config.num_kv_heads, seq_len, dtype=torch.bool)
        for phase, heads in pattern.heads_by_phase(config.num_heads).items():
            for head in heads:
                seen[head // group] |= pattern.sees(query, place[None], phase=phase)[0]
        dense = config.num_kv_heads * seq_len
        expected = 2 * int(seen.sum()) + 2 * dense  # two layers of each kind
        size = cache_size(config, batch_size=1, seq_len=seq_len, dtype="float32")
        assert size.needed == 2 * 4 * config.head_dim * expected


def test_a_window_needs_its_own_places_only() -> None:
    config = tiny("phi3_mini_4k_tiny")
    for seq_len, share in ((64, 1.0), (128, 1.0), (512, 0.25)):
        size = cache_size(config, batch_size=2, seq_len=seq_len, dtype="float16")
        assert size.needed == size.allocated * share
