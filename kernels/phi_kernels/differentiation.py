"""What a kernel cannot be asked for: a second gradient, and torch.func's transforms."""

from __future__ import annotations

from typing import Any, NoReturn

import torch


def is_transformed() -> bool:
    """Whether torch.func's grad, vmap or jvp is at work, which look into no kernel.

    A compiler traces the formulas of an operator instead, so there it is False.
    """
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_second_gradient(ctx: Any, *grads: Any) -> NoReturn:
    """The autograd formula of an operator that is a gradient itself."""
    raise RuntimeError(
        "the kernels of the experts are differentiable once. For a gradient of a gradient use "
        "experts.backend=reference, in transformers experts_implementation='eager'."
    )
