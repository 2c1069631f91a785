"""Our experts inside transformers' models: experts_implementation="phi_kernels".

    from moe.in_transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="phi_kernels")

It serves every model whose experts transformers 5 keeps fused (gate above up, no biases, SiLU):
Mixtral, Qwen3-MoE, Phimoe and others. Their routers stay as they are.
"""

from __future__ import annotations

from typing import Any

from phi_kernels import make_plan
from torch import Tensor, nn

from moe.errors import ConfigError
from moe.sparse.experts import EXPERT_BACKENDS

NAME = "phi_kernels"


def register() -> None:
    """Add our experts to transformers' table; ConfigError without transformers 5."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        raise ConfigError(
            "transformers: not installed, or older than version 5, which has no table of expert "
            "implementations. Install it with: pip install 'transformers>=5'"
        ) from None
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return y (T, D) for hidden_states (T, D), expert numbers (T, K) and their weights (T, K).

    Raises ConfigError, naming the class, where its experts are not the ones that we have.
    """
    _refuse_other_experts(module)
    experts: Any = module
    plan = make_plan(top_k_index, num_experts=experts.num_experts)
    return EXPERT_BACKENDS["auto"](
        hidden_states, top_k_weights, plan, experts.gate_up_proj, experts.down_proj
    )


def _refuse_other_experts(module: Any) -> None:
    differences = {
        "biases": module.has_bias,
        "no gate": not module.has_gate,
        "transposed weights": module.is_transposed,
        "interleaved gate and up": not module.is_concatenated,
        "a norm behind each expert": module.has_post_expert_norm,
        "expert parallelism": module._is_expert_parallel,
        "an activation other than SiLU": not _is_silu(module),
        "a gate of its own": type(module)._apply_gate.__name__ != "_default_apply_gate",
    }
    found = [name for name, differs in differences.items() if differs]
    if found:
        raise ConfigError(
            f"experts_implementation: got {NAME!r} for {type(module).__name__}, which has "
            f"{', '.join(found)}; allowed: fused SwiGLU experts without biases on one process. "
            "Use experts_implementation='grouped_mm' or 'eager'."
        )


def _is_silu(module: Any) -> bool:
    activation = getattr(module, "act_fn", None)
    name = getattr(activation, "__name__", type(activation).__name__)
    return name.lower() in ("silu", "siluactivation")
