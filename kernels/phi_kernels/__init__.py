"""Expert arithmetic on rows sorted by expert: knows tensors and offsets, no model, no processes."""

from phi_kernels.grouped_mm import expert_mlp as grouped_mm_expert_mlp
from phi_kernels.reference import expert_mlp as reference_expert_mlp

__all__ = ["grouped_mm_expert_mlp", "reference_expert_mlp"]
