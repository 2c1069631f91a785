"""The expert layers that are compared, each as one function of tokens, weights and expert numbers.

Every one does the same work from the same inputs: sort or plan, both products with SwiGLU, and the
weighted sum. What is not installed says so and is not measured.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import phi_kernels
import torch
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.sparse import megablocks_experts

# (x_TD, weight_TK float32, expert_TK, gate_up_EHD, down_EDF) -> y_TD
Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class NotHere(Exception):
    """An implementation cannot run on this machine or at this size; the text says why."""


def make_experts(name: str, *, size: Any, device: str) -> Experts:
    """Return the implementation of this name for a size (t, d, f, e, k); NotHere with a reason."""
    if name in ("phi_kernels", "phi_kernels recompute"):
        return _planned(_ours(device, recompute=name.endswith("recompute")))
    if name == "torch grouped_mm":
        return _planned(phi_kernels.grouped_mm_expert_mlp)
    if name == "megablocks":
        try:
            megablocks_experts.load_grouped_product()
        except ConfigError as error:
            raise NotHere(
                f"not installed: {str(error).partition('(')[2].partition(')')[0]}"
            ) from None
        return _planned(megablocks_experts.expert_mlp)
    if name == "scattermoe":
        return _scattermoe(size.e)
    return _transformers(name.removeprefix("transformers "), size)


# ours first: what a cut leaves is what matters most
NAMES = (
    "phi_kernels", "torch grouped_mm", "phi_kernels recompute", "transformers grouped_mm",
    "transformers eager", "transformers batched_mm", "megablocks", "scattermoe",
)  # fmt: skip


def _planned(expert_mlp: Callable[..., Tensor]) -> Experts:
    def experts(x_TD, weight_TK, expert_TK, gate_up_EHD, down_EDF):
        plan = phi_kernels.make_plan(expert_TK, num_experts=len(gate_up_EHD))
        return expert_mlp(x_TD, weight_TK, plan, gate_up_EHD, down_EDF)

    return experts


def _ours(device: str, *, recompute: bool) -> Callable[..., Tensor]:
    if device == "cuda":
        return lambda *inputs: phi_kernels.triton_expert_mlp(*inputs, recompute=recompute)

    # a dry run: the operator under the public function, in Triton's interpreter
    def interpreted(x_TD, weight_TK, plan, gate_up_EHD, down_EDF):
        keeps_hidden = not recompute and torch.is_grad_enabled()
        return torch.ops.phi_kernels.expert_mlp(
            x_TD, weight_TK, *plan, gate_up_EHD, down_EDF, None, None, keeps_hidden
        )[0]

    return interpreted


def _transformers(implementation: str, size: Any) -> Experts:
    """transformers' own experts of Phimoe with one of its implementations."""
    if implementation == "batched_mm":
        # it copies both weights of an expert for every row
        gibibytes = size.t * size.k * 3 * size.f * size.d * 2 / 2**30
        if gibibytes > 16:
            raise NotHere(f"would copy {gibibytes:,.0f} GiB of weights")
    try:
        modeling = importlib.import_module("transformers.models.phimoe.modeling_phimoe")
        from transformers import PhimoeConfig
    except ImportError as error:
        raise NotHere(f"not installed: {error}") from None
    if not hasattr(modeling, "PhimoeExperts"):
        raise NotHere("transformers older than 5: no table of expert implementations")
    config = PhimoeConfig(
        hidden_size=size.d, intermediate_size=size.f, num_local_experts=size.e,
        num_experts_per_tok=size.k, hidden_act="silu",
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        module: nn.Module = modeling.PhimoeExperts(config)

    def experts(x_TD, weight_TK, expert_TK, gate_up_EHD, down_EDF):
        # the caller's leaves, not the module's own parameters, get the gradients
        weights = {"gate_up_proj": gate_up_EHD, "down_proj": down_EDF}
        arguments = (x_TD, expert_TK, weight_TK.to(x_TD.dtype))
        return torch.func.functional_call(module, weights, arguments)

    return experts


def _scattermoe(num_experts: int) -> Experts:
    try:
        scattermoe = importlib.import_module("scattermoe.parallel_experts")
        linear, sort = scattermoe.parallel_linear, scattermoe.flatten_sort_count
    except (ImportError, AttributeError, RuntimeError) as error:
        raise NotHere(f"not installed: {error}") from None

    def experts(x_TD, weight_TK, expert_TK, gate_up_EHD, down_EDF):
        sorted_N, scattered_N, offset_E = sort(expert_TK, num_experts=num_experts)
        index = (sorted_N, scattered_N, offset_E)
        top_k = expert_TK.shape[1]
        hidden = linear(x_TD, gate_up_EHD.transpose(1, 2), top_k, *index, grouped_out=True)
        gate, up = hidden.chunk(2, dim=-1)
        act = nn.functional.silu(gate) * up
        gates = weight_TK.to(x_TD.dtype)
        return linear(act, down_EDF.transpose(1, 2), 1, *index, grouped_in=True, gates=gates)

    return experts
