"""Each operator as a few lines that a reader can check by eye; any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from phi_kernels.block_pattern import BlockPattern
from phi_kernels.dispatch_plan import DispatchPlan, TileTable

HEUN_SCALE = 0.3333  # of the released code, not 1/3 (SparseMixer/sparsemixer_v2.py)


def sparsemixer(
    logit_TE: Tensor,
    *,
    threshold: float,
    sample_TKE: Tensor | None = None,
    heun_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight_TK, expert_TK (int64) and count_E (int64): two experts without replacement.

    The weights are not renormalised (their sum is about 2). sample_TKE (T, 2, E) and heun_TK (T, 2)
    are uniform in (0, 1): given, experts are sampled and the logits get the router's own gradient
    (`_sample`); absent, experts are the largest and the gradient is the ordinary one of the
    masked softmax, which is 0 where one expert survives.
    Source: microsoft/SparseMixer, sparsemixer_v2.py; GRIN (arXiv 2409.12136), Algorithm 3.
    """
    stages: list[tuple[Tensor, Tensor]] = []
    stage_TE = logit_TE
    for k in range(2):
        gate_TE, expert_T = _masked(logit_TE, stage_TE, threshold)
        if sample_TKE is None or heun_TK is None:
            weight_T = _pick(gate_TE.softmax(dim=-1), expert_T)
        else:
            expert_T, weight_T = _sample(gate_TE, sample_TKE[:, k], heun_TK[:, k])
        stages.append((weight_T, expert_T))
        stage_TE = logit_TE.scatter(1, expert_T[:, None], float("-inf"))
    weight_TK, expert_TK = (torch.stack(parts, dim=1) for parts in zip(*stages, strict=True))
    return weight_TK, expert_TK, _count(expert_TK, logit_TE.shape[1])


def top_k_softmax(
    logit_TE: Tensor, *, top_k: int, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight_TK, expert_TK (int64) and count_E (int64): softmax over all, the K largest.

    Of equal probabilities the expert with the lower number comes first. With renormalise the
    weights are divided by their sum.
    """
    # a stable sort, because torch.topk leaves the order of equal numbers open
    sorted_TE, order_TE = logit_TE.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    weight_TK, expert_TK = sorted_TE[:, :top_k], order_TE[:, :top_k]
    if renormalise:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    return weight_TK, expert_TK, _count(expert_TK, logit_TE.shape[1])


def make_plan(expert_TK: Tensor, *, num_experts: int) -> DispatchPlan:
    """Sort the T * K slots by expert; no `.item()`, no boolean indexing."""
    expert_N = expert_TK.flatten()
    sorted_N, slot_of_row_N = expert_N.sort(stable=True)
    row_of_slot_N = torch.empty_like(slot_of_row_N)
    row_of_slot_N[slot_of_row_N] = torch.arange(expert_N.numel(), device=expert_N.device)
    experts_E = torch.arange(num_experts, device=expert_N.device)
    offset_E = torch.searchsorted(sorted_N, experts_E, right=True).int()
    return DispatchPlan(slot_of_row_N, row_of_slot_N.view_as(expert_TK), offset_E)


def make_tiles(offset_E: Tensor, *, num_rows: int, tile_rows: int) -> TileTable:
    """Cut each expert's rows into tiles of tile_rows, the last of an expert shorter."""
    num_experts = len(offset_E)
    start_E = torch.cat([offset_E.new_zeros(1), offset_E[:-1]])
    tiles_E = (offset_E - start_E + tile_rows - 1) // tile_rows
    end_E = tiles_E.cumsum(dim=0)
    tile_M = torch.arange(-(-num_rows // tile_rows) + num_experts, device=offset_E.device)
    expert_M = torch.searchsorted(end_E, tile_M, right=True).clamp(max=num_experts - 1)
    row_M = start_E[expert_M] + (tile_M - (end_E - tiles_E)[expert_M]) * tile_rows
    is_tile_M = tile_M < end_E[-1]
    return TileTable((expert_M * is_tile_M).int(), (row_M * is_tile_M).int(), end_E[-1:].int())


def gather_rows(x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    """Return rows (N, D), each a copy of its token, sorted by expert."""
    return x_TD[plan.token_of_row_N()]


def combine_rows(rows_ND: Tensor, weight_TK: Tensor, plan: DispatchPlan) -> Tensor:
    """Return y (T, D) in the rows' type: y_t = sum over k of weight[t, k] * rows[row[t, k]]."""
    weighted_TKD = weight_TK[:, :, None] * rows_ND[plan.row_of_slot_TK]
    return weighted_TKD.sum(dim=1).to(rows_ND.dtype)


def gate_up(x_TD: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden (N, 2F) = [gate, up] of the tokens' rows, and act (N, F) = silu(gate) * up."""
    hidden_NH = grouped_gemm(
        gather_rows(x_TD, plan), gate_up_EHD, plan.offset_E, is_transposed=True
    )
    gate_NF, up_NF = hidden_NH.chunk(2, dim=-1)
    return hidden_NH, functional.silu(gate_NF) * up_NF


def grouped_gemm(
    rows_NP: Tensor, weight: Tensor, offset_E: Tensor, *, is_transposed: bool
) -> Tensor:
    """Return out (N, Q): each expert's rows times its (P, Q), or its (Q, P) where is_transposed."""
    matrices = weight.transpose(1, 2) if is_transposed else weight
    parts = _rows_of_experts(rows_NP, offset_E)
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, matrices, strict=True)])


def swiglu_backward(
    grad_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, hidden_NH: Tensor, down_EDF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad_hidden (N, 2F), weight * act (N, F) and the gradient of weight_TK.

    For y_t = sum over k of weight * W2 act and grad_TD = dL/dy.
    """
    weight_N1 = weight_TK.flatten()[plan.slot_of_row_N][:, None]
    gate_NF, up_NF = hidden_NH.chunk(2, dim=-1)
    sigmoid_NF = gate_NF.sigmoid()
    act_NF = gate_NF * sigmoid_NF * up_NF
    grad_act_NF = grouped_gemm(
        gather_rows(grad_TD, plan), down_EDF, plan.offset_E, is_transposed=False
    )
    grad_weight_N = (grad_act_NF * act_NF).sum(dim=-1)
    grad_up_NF = weight_N1 * grad_act_NF * gate_NF * sigmoid_NF
    slope_NF = sigmoid_NF * (1 + gate_NF * (1 - sigmoid_NF))  # of silu
    grad_gate_NF = weight_N1 * grad_act_NF * up_NF * slope_NF
    grad_hidden_NH = torch.cat([grad_gate_NF, grad_up_NF], dim=-1)
    return grad_hidden_NH, weight_N1 * act_NF, grad_weight_N[plan.row_of_slot_TK]


def weight_gradient(
    left: Tensor, right: Tensor, plan: DispatchPlan, *, left_is_tokens: bool, right_is_tokens: bool
) -> Tensor:
    """Return (E, P, Q): left^T right over each expert's rows; tokens are gathered first."""
    left = gather_rows(left, plan) if left_is_tokens else left
    right = gather_rows(right, plan) if right_is_tokens else right
    sides = (_rows_of_experts(side, plan.offset_E) for side in (left, right))
    return torch.stack([one.T @ other for one, other in zip(*sides, strict=True)])


def _rows_of_experts(rows: Tensor, offset_E: Tensor) -> list[Tensor]:
    ends = offset_E.tolist()
    return [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Return y (T, D): y_t = sum over k of weight[t, k] * W2 (silu(W1 x_t) * W3 x_t).

    The W are those of the k-th expert of token t: gate_up_EHD (E, 2F, D) is W1 above W3, down_EDF
    (E, D, F) is W2. weight_TK is float32 or wider. Reads the plan's offsets on the host.
    """
    _, act_NF = gate_up(x_TD, plan, gate_up_EHD)
    rows_ND = grouped_gemm(act_NF, down_EDF, plan.offset_E, is_transposed=True)
    return combine_rows(rows_ND, weight_TK, plan)


def every_expert_mlp(
    x_TD: Tensor, weight_TK: Tensor, plan: DispatchPlan, gate_up_EHD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same as expert_mlp by computing every expert for every token: E / K times the work.

    No size follows the routing and no value is read, so that torch.func's transforms look into it.
    """
    row_N = torch.arange(plan.slot_of_row_N.shape[0], device=x_TD.device)
    expert_N = torch.searchsorted(plan.offset_E.long(), row_N, right=True)
    expert_E = torch.arange(gate_up_EHD.shape[0], device=x_TD.device)
    is_on_TKE = expert_N[plan.row_of_slot_TK][:, :, None] == expert_E  # one_hot reads values
    weight_TE = (is_on_TKE * weight_TK[:, :, None]).sum(dim=1)
    gate_TEF, up_TEF = torch.einsum("td,ehd->teh", x_TD, gate_up_EHD).chunk(2, dim=-1)
    act_TEF = functional.silu(gate_TEF) * up_TEF
    y_TED = torch.einsum("tef,edf->ted", act_TEF, down_EDF)
    return (weight_TE[:, :, None] * y_TED).sum(dim=1).to(x_TD.dtype)


def block_sparse_attention(
    query_BHSC: Tensor,
    key_BGKC: Tensor,
    value_BGKC: Tensor,
    *,
    pattern: BlockPattern,
    scale: float,
) -> Tensor:
    """Return out (B, H, S, C): softmax over the keys that the pattern shows, of scale * q . k.

    The queries are the last S of the K places; query head h reads key head h // (H / G).
    """
    num_heads, num_queries = query_BHSC.shape[1:3]
    num_keys = key_BGKC.shape[2]
    place_K = torch.arange(num_keys, device=query_BHSC.device)
    place_S = place_K[num_keys - num_queries :]
    mask_HSK = torch.zeros(
        num_heads, num_queries, num_keys, dtype=torch.bool, device=place_K.device
    )
    for phase, heads in pattern.heads_by_phase(num_heads).items():
        mask_HSK[heads] = pattern.sees(place_S[:, None], place_K[None, :], phase=phase)
    key_BHKC, value_BHKC = (
        part.repeat_interleave(num_heads // part.shape[1], dim=1) for part in (key_BGKC, value_BGKC)
    )
    score_BHSK = scale * (query_BHSC @ key_BHKC.transpose(2, 3))
    score_BHSK = score_BHSK.float() if score_BHSK.dtype != torch.float64 else score_BHSK
    probability_BHSK = score_BHSK.masked_fill(~mask_HSK, float("-inf")).softmax(dim=-1)
    return probability_BHSK.to(value_BHKC.dtype) @ value_BHKC


def causal_attention(
    query_BHSC: Tensor, key_BGSC: Tensor, value_BGSC: Tensor, *, scale: float
) -> Tensor:
    """Return out (B, H, S, C): softmax over the keys up to each query's place, of scale * q . k.

    Query head h reads key head h // (H / G).
    """
    length = query_BHSC.shape[2]
    everything = BlockPattern(
        block_size=max(1, length), num_local_blocks=1, vertical_stride=1, is_same_for_all_heads=True
    )
    return block_sparse_attention(query_BHSC, key_BGSC, value_BGSC, pattern=everything, scale=scale)


def _masked(logit_TE: Tensor, stage_TE: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the stage's scores, -inf for all but the survivors, and the largest's expert (T,).

    Survivors are within 2 * threshold (relative) of the stage's largest score. |.| is of the
    original scores, clamped below by the signed maximum; 0/0 counts as surviving. An expert chosen
    before is -inf in stage_TE already.
    """
    with torch.no_grad():
        top_T1, expert_T1 = stage_TE.max(dim=-1, keepdim=True)
        scale_TE = torch.maximum(logit_TE.abs(), top_T1)
        is_below_TE = (top_T1 - logit_TE) / scale_TE > 2 * threshold
    return stage_TE.masked_fill(is_below_TE, float("-inf")), expert_T1.squeeze(1)


def _sample(gate_TE: Tensor, sample_TE: Tensor, heun_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return expert_T and weight_T = scale * p_D, with dL/ds_i = dL/dw * p_D * (1[i = D] - p_i).

    The third-order Heun estimator of GRIN equation 8: the scale moves the point at which the
    expert's gradient is taken, so it enters the forward value only.
    """
    probability_TE = gate_TE.softmax(dim=-1)
    with torch.no_grad():
        # Gumbel-max: the argmax of g - ln(e), e exponential, is a draw from softmax(g)
        expert_T = (gate_TE - (-sample_TE.log()).log()).argmax(dim=-1)
        is_full_T = (expert_T == gate_TE.argmax(dim=-1)) | (heun_T > 0.75)
        scale_T = HEUN_SCALE + (1 - HEUN_SCALE) * is_full_T.to(gate_TE.dtype)
    chosen_T = _pick(probability_TE, expert_T)
    # the value of the first term, the gradient of the second, whose value is 0
    return expert_T, scale_T * chosen_T.detach() + (chosen_T - chosen_T.detach())


def _pick(value_TE: Tensor, expert_T: Tensor) -> Tensor:
    return value_TE.gather(1, expert_T[:, None]).squeeze(1)


def _count(expert_TK: Tensor, num_experts: int) -> Tensor:
    return functional.one_hot(expert_TK, num_experts).sum(dim=(0, 1))
