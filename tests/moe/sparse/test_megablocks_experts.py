"""The megablocks back-end: what it says where it is missing, and how it is wired where it is not.

No build of MegaBlocks runs without a GPU, so its grouped product is a stand-in with the documented
signature and its demands: gmm(a, b, batch_sizes, trans_b), batch_sizes int64 on the host.
"""

from __future__ import annotations

import sys
import types

import phi_kernels
import pytest
import torch
from torch import Tensor

from moe.config import EXPERT_BACKEND_NAMES, ExpertsConfig
from moe.errors import ConfigError
from moe.model_config import ModelConfig
from moe.sparse import megablocks_experts
from moe.sparse.experts import EXPERT_BACKENDS, GroupedExperts

MODEL = ModelConfig(hidden_size=8, intermediate_size=16, num_experts=4, num_layers=1)


def stand_in_gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    assert batch_sizes.dtype == torch.int64
    assert batch_sizes.device.type == "cpu"
    assert batch_sizes.shape == (len(b),)
    assert a.is_contiguous()
    parts = a.split(batch_sizes.tolist())
    return torch.cat([part @ (w.T if trans_b else w) for part, w in zip(parts, b, strict=True)])


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch):
    """As on a machine without any of the packages, whatever this one has."""
    for name in ("megablocks", "megablocks.grouped_gemm_util", "grouped_gemm", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # the import fails
    real = megablocks_experts.importlib.util.find_spec
    monkeypatch.setattr(
        megablocks_experts.importlib.util,
        "find_spec",
        lambda name: None if name == "kernels" and sys.modules[name] is None else real(name),
    )
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    megablocks_experts.load_grouped_product.cache_clear()
    yield
    megablocks_experts.load_grouped_product.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(content)
    module.__spec__ = types.SimpleNamespace(origin=f"/somewhere/{name}/__init__.py")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_every_name_of_the_configuration_is_a_back_end():
    assert sorted(EXPERT_BACKENDS) == sorted(EXPERT_BACKEND_NAMES)


def test_a_missing_package_is_told_when_the_experts_are_built():
    with pytest.raises(ConfigError) as caught:
        GroupedExperts(MODEL, ExpertsConfig(backend="megablocks"))
    message = str(caught.value)
    assert message.startswith("experts.backend: got 'megablocks'")
    for part in ("No module named 'kernels'", "pins torch 2.7", "pip install", "HF_HUB_OFFLINE=1"):
        assert part in message
    alternatives = message.rsplit(": ", 1)[1].split(", ")
    assert alternatives == sorted(set(EXPERT_BACKEND_NAMES) - {"megablocks"})


def test_a_build_that_does_not_load_is_reported_with_its_own_words(monkeypatch):
    def broken(name: str) -> object:
        raise OSError("libcudart.so.11: cannot open shared object file")

    module = install(monkeypatch, "megablocks")
    module.__getattr__ = broken  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="libcudart"):
        megablocks_experts.load_grouped_product()


def test_a_copy_that_would_be_downloaded_is_not_used(monkeypatch):
    def get_kernel(*_: object, **__: object) -> None:
        pytest.fail("asked the network")

    install(monkeypatch, "kernels", get_kernel=get_kernel)
    constants = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    install(monkeypatch, "huggingface_hub", constants=constants)
    with pytest.raises(ConfigError, match="would be downloaded"):
        megablocks_experts.load_grouped_product()


@pytest.mark.parametrize("how", ["offline", "local copy", "package", "released", "grouped_gemm"])
def test_each_of_the_builds_is_found(monkeypatch, how):
    operations = types.SimpleNamespace(gmm=stand_in_gmm)
    build = types.SimpleNamespace(gg_ops=operations)
    asked = []

    def get_kernel(name: str, *, version: int) -> object:
        asked.append((name, version))
        return build

    if how in ("offline", "local copy"):
        install(monkeypatch, "kernels", get_kernel=get_kernel)
        constants = types.SimpleNamespace(HF_HUB_OFFLINE=how == "offline")
        install(monkeypatch, "huggingface_hub", constants=constants)
        if how == "local copy":
            monkeypatch.setenv("LOCAL_KERNELS", "kernels-community/megablocks=/somewhere")
    elif how == "package":
        install(monkeypatch, "megablocks", gg_ops=operations)
    elif how == "released":
        install(monkeypatch, "megablocks")
        install(monkeypatch, "megablocks.grouped_gemm_util", ops=operations)
    else:
        install(monkeypatch, "grouped_gemm", ops=operations)
    assert megablocks_experts.load_grouped_product() is stand_in_gmm
    assert asked == [("kernels-community/megablocks", 1)] * (how in ("offline", "local copy"))


def test_the_arithmetic_is_the_references_in_all_gradients():
    # an expert without rows between two with some, both slots of a token on one expert
    expert_TK = torch.tensor([[0, 2], [2, 2], [0, 0], [2, 3]])
    plan = phi_kernels.make_plan(expert_TK, num_experts=4)
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (4, 2), (4, 32, 8), (4, 8, 16))
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    results = []
    for function in (
        phi_kernels.reference_expert_mlp,
        lambda *rest: megablocks_experts.expert_mlp_with(stand_in_gmm, *rest),
    ):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = function(*leaves[:2], plan, *leaves[2:])
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for exact, got in zip(*results, strict=True):
        assert torch.allclose(exact, got, rtol=1e-12, atol=1e-12)


def test_tokens_that_its_products_do_not_take_are_refused(monkeypatch):
    operations = types.SimpleNamespace(gmm=stand_in_gmm)
    install(monkeypatch, "grouped_gemm", ops=operations)
    experts = GroupedExperts(MODEL, ExpertsConfig(backend="megablocks"))
    plan = phi_kernels.make_plan(torch.tensor([[0, 1]]), num_experts=4)
    with pytest.raises(
        ConfigError, match=r"got 'megablocks' with torch.float32 on cpu; .*bfloat16"
    ):
        experts(torch.ones(1, 8), torch.ones(1, 2), plan)
