"""Our experts inside transformers' models: experts_implementation="phi_kernels".

    from moe.in_transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="phi_kernels")

It serves every model whose experts transformers, from 5.7 on, keeps fused (gate above up, no
biases, SiLU): Mixtral, Qwen3-MoE, Phimoe and others. Their routers stay as they are.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from phi_kernels import make_plan
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.sparse.autocast import in_product_type
from moe.sparse.experts import EXPERT_BACKENDS

NAME = "phi_kernels"
_OLDEST = (5, 7)  # 5.0 to 5.6 compare the name with a fixed list
_INSTALL = "pip install 'transformers>=5.7'"


def register() -> None:
    """Add our experts to transformers' table; ConfigError where its version takes no others."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise ConfigError(
            "transformers: not installed, or older than version 5, which has no table of expert "
            f"implementations. Install it with: {_INSTALL}"
        ) from None
    found = importlib.metadata.version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        raise ConfigError(
            f"transformers: got {found}, whose models refuse every experts_implementation that is "
            f"not transformers' own. Install a later one with: {_INSTALL}"
        )
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return y (T, D) for hidden_states (T, D), expert numbers (T, K) and their weights (T, K).

    Types may differ, as under autocast: products are made in its type where it is on, else in that
    of hidden_states, and y has the type of hidden_states. Raises ConfigError, naming the class,
    where its experts are not the ones that we have.
    """
    _refuse_other_experts(module)
    experts: Any = module
    plan = make_plan(top_k_index, num_experts=experts.num_experts)
    x_TD = in_product_type(hidden_states)
    y_TD = EXPERT_BACKENDS["auto"](
        x_TD, top_k_weights, plan,
        experts.gate_up_proj.to(x_TD.dtype), experts.down_proj.to(x_TD.dtype),
    )  # fmt: skip
    return y_TD.to(hidden_states.dtype)


def _refuse_other_experts(module: Any) -> None:
    # transformers 5.0 sets two of the flags, later versions more; one that is not set says nothing
    is_set = lambda flag, default: getattr(module, flag, default)  # noqa: E731
    differences = {
        "biases": is_set("has_bias", False),
        "no gate": not (is_set("has_gate", True) and hasattr(module, "gate_up_proj")),
        "transposed weights": is_set("is_transposed", False),
        "interleaved gate and up": not is_set("is_concatenated", True),
        "a norm behind each expert": is_set("has_post_expert_norm", False),
        "expert parallelism": is_set("_is_expert_parallel", False),
        "an activation other than SiLU": not _is_silu(module),
        "a gate of its own": _gate_name(module) != "_default_apply_gate",
    }
    found = [name for name, differs in differences.items() if differs]
    if found:
        raise ConfigError(
            f"experts_implementation: got {NAME!r} for {type(module).__name__}, which has "
            f"{', '.join(found)}; allowed: fused SwiGLU experts without biases on one process. "
            "Use experts_implementation='grouped_mm' or 'eager'."
        )


def _gate_name(module: Any) -> str:
    return getattr(getattr(type(module), "_apply_gate", None), "__name__", "none")


def _is_silu(module: Any) -> bool:
    activation = getattr(module, "act_fn", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    return name.lower() in ("silu", "siluactivation")
