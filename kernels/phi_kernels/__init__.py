"""Arithmetic on tensors alone: no model, no configuration, no processes."""

from phi_kernels.block_pattern import BlockPattern
from phi_kernels.block_sparse_attention import block_sparse_attention
from phi_kernels.causal_attention import causal_attention
from phi_kernels.combine import combine_rows, gather_rows
from phi_kernels.cpu_experts import expert_mlp as cpu_expert_mlp
from phi_kernels.dispatch_plan import DispatchPlan, TileTable
from phi_kernels.grouped_mm import expert_mlp as grouped_mm_expert_mlp
from phi_kernels.plan import make_plan, make_tiles
from phi_kernels.reference import block_sparse_attention as reference_block_sparse_attention
from phi_kernels.reference import causal_attention as reference_causal_attention
from phi_kernels.reference import expert_mlp as reference_expert_mlp
from phi_kernels.route import sparsemixer, top_k_softmax
from phi_kernels.triton_experts import expert_mlp as triton_expert_mlp
from phi_kernels.triton_experts import takes as triton_takes

__all__ = [
    "BlockPattern",
    "DispatchPlan",
    "TileTable",
    "block_sparse_attention",
    "causal_attention",
    "combine_rows",
    "cpu_expert_mlp",
    "gather_rows",
    "grouped_mm_expert_mlp",
    "make_plan",
    "make_tiles",
    "reference_block_sparse_attention",
    "reference_causal_attention",
    "reference_expert_mlp",
    "sparsemixer",
    "top_k_softmax",
    "triton_expert_mlp",
    "triton_takes",
]
