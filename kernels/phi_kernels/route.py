"""Which experts each token takes and with what weights, their counts, and the logits' gradient.

    weight_TK   (T, K) float32   weights in order of choice        forward -> experts
    expert_TK   (T, K) int64     the choices                       forward -> plan, backward
    count_E     (E,)   int64     choices of each expert            forward -> losses, metrics

A program holds the logits of a block of tokens in registers through all choices, in float32. The
counts are integer atomic additions: their order changes nothing. The backward kernels make the
probabilities again from the logits. A token with a NaN logit gets experts in 0 to E - 1, as in the
reference, and NaN weights.
"""

# a kernel's type says that calling it raises, which is so outside of kernels
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phi_kernels import reference
from phi_kernels.triton_device import on_its_device, runs_triton

_ELEMENTS = 1024  # of a block of logits: 8 a thread of 4 warps, and enough programs for a GPU
_HEUN_SCALE = tl.constexpr(reference.HEUN_SCALE)


@triton.jit
def _largest(value_te, offs_e):
    """The largest of each row and its first place; NaN is larger than all numbers, as in torch."""
    is_nan_te = value_te != value_te
    has_nan_t = tl.max(is_nan_te.to(tl.int32), axis=1) > 0
    top_t = tl.max(tl.where(is_nan_te, float("-inf"), value_te), axis=1)
    is_top_te = tl.where(has_nan_t[:, None], is_nan_te, value_te == top_t[:, None])
    place_t = tl.min(tl.where(is_top_te, offs_e[None, :], value_te.shape[1]), axis=1)
    return tl.where(has_nan_t, float("nan"), top_t), place_t


@triton.jit
def _softmax(value_te, top_t):
    power_te = tl.exp(value_te - top_t[:, None])
    # IEEE division: what is alone gets 1 exactly
    return tl.div_rn(power_te, tl.sum(power_te, axis=1)[:, None])


@triton.jit
def _load_logits(logit_ptr, offs_t, offs_e, num_tokens, E: tl.constexpr):
    """Logits in float32, and as scores: -inf in the padding of E."""
    mask_e = (offs_e < E)[None, :]
    mask = (offs_t < num_tokens)[:, None] & mask_e
    # 1 where nothing is: a token of zeros would divide 0 by 0
    logit_te = tl.load(logit_ptr + offs_t[:, None] * E + offs_e[None, :], mask=mask, other=1.0)
    logit_te = logit_te.to(tl.float32)
    return logit_te, tl.where(mask_e, logit_te, float("-inf"))


@triton.jit
def _stage(logit_te, score_te, offs_e, limit):
    """One choice of SparseMixer: scores of the survivors, their softmax, the largest's expert.

    score_te is logit_te with -inf for what may not be chosen. Survivors are within limit of the
    largest score, relative to the logit or the (signed) largest; 0/0, a NaN, survives.
    """
    top_t, largest_t = _largest(score_te, offs_e)
    scale_te = tl.maximum(tl.abs(logit_te), top_t[:, None])
    # IEEE division: the quotient decides who survives, as on a CPU
    is_below_te = tl.div_rn(top_t[:, None] - logit_te, scale_te) > limit
    gate_te = tl.where(is_below_te, float("-inf"), score_te)
    return gate_te, _softmax(gate_te, top_t), largest_t


@triton.jit
def _add_counts(count_ptr, is_chosen_te, offs_t, offs_e, num_tokens, E: tl.constexpr):
    count_e = tl.sum((is_chosen_te & (offs_t < num_tokens)[:, None]).to(tl.int32), axis=0)
    mask = (offs_e < E) & (count_e > 0)
    tl.atomic_add(count_ptr + offs_e, count_e.to(tl.int64), mask=mask, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def _sparsemixer_fwd_kernel(
    logit_ptr, sample_ptr, heun_ptr, weight_ptr, expert_ptr, count_ptr, num_tokens, limit,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (T / BLOCK_T,): a program reads its tokens' logits and draws, writes both choices.

    Adds to count_E, which starts at 0. sample_ptr and heun_ptr None: the largest, not a draw.
    """
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, E_PADDED)
    mask_t = offs_t < num_tokens
    logit_te, score_te = _load_logits(logit_ptr, offs_t, offs_e, num_tokens, E)
    for k in tl.static_range(2):
        gate_te, probability_te, expert_t = _stage(logit_te, score_te, offs_e, limit)
        scale_t = tl.full([BLOCK_T], 1.0, tl.float32)
        if sample_ptr is not None:
            offs = (offs_t[:, None] * 2 + k) * E + offs_e[None, :]
            mask = mask_t[:, None] & (offs_e < E)[None, :]
            sample_te = tl.load(sample_ptr + offs, mask=mask, other=0.5).to(tl.float32)
            heun_t = tl.load(heun_ptr + offs_t * 2 + k, mask=mask_t, other=0.0).to(tl.float32)
            largest_t = expert_t
            # Gumbel-max: the argmax of g - ln(e), e exponential, is a draw from softmax(g)
            noisy_te = gate_te - tl.log(-tl.log(sample_te))
            _, expert_t = _largest(noisy_te, offs_e)
            is_full_t = (expert_t == largest_t) | (heun_t > 0.75)
            scale_t = tl.where(is_full_t, 1.0, _HEUN_SCALE)
        is_expert_te = offs_e[None, :] == expert_t[:, None]
        chosen_t = tl.sum(tl.where(is_expert_te, probability_te, 0.0), axis=1)
        tl.store(weight_ptr + offs_t * 2 + k, scale_t * chosen_t, mask=mask_t)
        tl.store(expert_ptr + offs_t * 2 + k, expert_t.to(tl.int64), mask=mask_t)
        _add_counts(count_ptr, is_expert_te, offs_t, offs_e, num_tokens, E)
        score_te = tl.where(is_expert_te, float("-inf"), score_te)


@triton.jit(do_not_specialize=["num_tokens"])
def _sparsemixer_bwd_kernel(
    grad_weight_ptr, logit_ptr, expert_ptr, grad_logit_ptr, num_tokens, limit,
    E: tl.constexpr, E_PADDED: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (T / BLOCK_T,): a program reads logits, choices and gradients, writes grad_logit_TE.

    dL/ds_i = sum over k of g_k p_D (1[i = D] - p_i), D and p those of choice k.
    """
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, E_PADDED)
    mask_t = offs_t < num_tokens
    logit_te, score_te = _load_logits(logit_ptr, offs_t, offs_e, num_tokens, E)
    grad_te = tl.zeros([BLOCK_T, E_PADDED], tl.float32)
    for k in tl.static_range(2):
        _, probability_te, _ = _stage(logit_te, score_te, offs_e, limit)
        expert_t = tl.load(expert_ptr + offs_t * 2 + k, mask=mask_t, other=0).to(tl.int32)
        grad_t = tl.load(grad_weight_ptr + offs_t * 2 + k, mask=mask_t, other=0.0).to(tl.float32)
        is_expert_te = offs_e[None, :] == expert_t[:, None]
        chosen_t = tl.sum(tl.where(is_expert_te, probability_te, 0.0), axis=1)
        slope_te = tl.where(is_expert_te, 1.0, 0.0) - probability_te
        grad_te += (grad_t * chosen_t)[:, None] * slope_te
        score_te = tl.where(is_expert_te, float("-inf"), score_te)
    offs = offs_t[:, None] * E + offs_e[None, :]
    tl.store(grad_logit_ptr + offs, grad_te, mask=mask_t[:, None] & (offs_e < E)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _top_k_softmax_fwd_kernel(
    logit_ptr, weight_ptr, expert_ptr, count_ptr, num_tokens,
    E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr,
    RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (T / BLOCK_T,): a program reads its tokens' logits and writes their K choices.

    Adds to count_E, which starts at 0.
    """
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e, offs_k = tl.arange(0, E_PADDED), tl.arange(0, K_PADDED)
    _, score_te = _load_logits(logit_ptr, offs_t, offs_e, num_tokens, E)
    top_t, _ = _largest(score_te, offs_e)
    # what is chosen already is -1; the padding is 0 and after the last expert, so never chosen
    left_te = _softmax(score_te, top_t)
    weight_tk = tl.zeros([BLOCK_T, K_PADDED], tl.float32)
    expert_tk = tl.zeros([BLOCK_T, K_PADDED], tl.int32)
    for k in range(K):
        probability_t, expert_t = _largest(left_te, offs_e)
        is_k = (offs_k == k)[None, :]
        weight_tk = tl.where(is_k, probability_t[:, None], weight_tk)
        expert_tk = tl.where(is_k, expert_t[:, None], expert_tk)
        left_te = tl.where(offs_e[None, :] == expert_t[:, None], -1.0, left_te)
    if RENORMALISE:
        weight_tk = tl.div_rn(weight_tk, tl.sum(weight_tk, axis=1)[:, None])
    offs = offs_t[:, None] * K + offs_k[None, :]
    mask = (offs_t < num_tokens)[:, None] & (offs_k < K)[None, :]
    tl.store(weight_ptr + offs, weight_tk, mask=mask)
    tl.store(expert_ptr + offs, expert_tk.to(tl.int64), mask=mask)
    _add_counts(count_ptr, left_te == -1.0, offs_t, offs_e, num_tokens, E)


@triton.jit(do_not_specialize=["num_tokens"])
def _top_k_softmax_bwd_kernel(
    grad_weight_ptr, logit_ptr, expert_ptr, grad_logit_ptr, num_tokens,
    E: tl.constexpr, E_PADDED: tl.constexpr, K: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (T / BLOCK_T,): a program reads logits, choices and gradients, writes grad_logit_TE.

    dL/ds_i = p_i (g_i - sum over j of g_j p_j), g 0 for experts not chosen; p the softmax over all,
    or, as weights divided by their sum are, over the chosen.
    """
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, E_PADDED)
    mask_t = offs_t < num_tokens
    _, score_te = _load_logits(logit_ptr, offs_t, offs_e, num_tokens, E)
    top_t, _ = _largest(score_te, offs_e)
    grad_te = tl.zeros([BLOCK_T, E_PADDED], tl.float32)
    is_chosen_te = tl.zeros([BLOCK_T, E_PADDED], tl.int32)
    for k in range(K):
        expert_t = tl.load(expert_ptr + offs_t * K + k, mask=mask_t, other=0).to(tl.int32)
        grad_t = tl.load(grad_weight_ptr + offs_t * K + k, mask=mask_t, other=0.0).to(tl.float32)
        is_expert_te = offs_e[None, :] == expert_t[:, None]
        grad_te = tl.where(is_expert_te, grad_t[:, None], grad_te)
        is_chosen_te = tl.where(is_expert_te, 1, is_chosen_te)
    if RENORMALISE:
        score_te = tl.where(is_chosen_te > 0, score_te, float("-inf"))
    probability_te = _softmax(score_te, top_t)
    dot_t = tl.sum(grad_te * probability_te, axis=1)
    grad_te = probability_te * (grad_te - dot_t[:, None])
    offs = offs_t[:, None] * E + offs_e[None, :]
    tl.store(grad_logit_ptr + offs, grad_te, mask=mask_t[:, None] & (offs_e < E)[None, :])


@on_its_device
def launch_sparsemixer(
    logit_TE: Tensor, threshold: float, sample_TKE: Tensor | None, heun_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """weight (T, 2), expert (T, 2), count (E,); reads no value on the host."""
    weight_TK, expert_TK, count_E = made = _empty(logit_TE, 2)
    count_E.zero_()
    grid, sizes = _blocks(logit_TE)
    if sample_TKE is None or heun_TK is None:
        sample_TKE = heun_TK = None
    else:
        sample_TKE, heun_TK = sample_TKE.contiguous(), heun_TK.contiguous()
    _sparsemixer_fwd_kernel[grid](
        logit_TE.contiguous(), sample_TKE, heun_TK, weight_TK, expert_TK, count_E,
        logit_TE.shape[0], 2 * threshold, **sizes,
    )  # fmt: skip
    return made


@on_its_device
def launch_sparsemixer_backward(
    grad_weight_TK: Tensor, logit_TE: Tensor, expert_TK: Tensor, threshold: float
) -> Tensor:
    """grad_logit (T, E) of launch_sparsemixer, of draws and of the largest alike."""
    grad_logit_TE = _empty_gradient(logit_TE)
    grid, sizes = _blocks(logit_TE)
    _sparsemixer_bwd_kernel[grid](
        grad_weight_TK.contiguous(), logit_TE.contiguous(), expert_TK.contiguous(), grad_logit_TE,
        logit_TE.shape[0], 2 * threshold, **sizes,
    )  # fmt: skip
    return grad_logit_TE


@on_its_device
def launch_top_k_softmax(
    logit_TE: Tensor, top_k: int, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """weight (T, K), expert (T, K), count (E,); reads no value on the host."""
    weight_TK, expert_TK, count_E = made = _empty(logit_TE, top_k)
    count_E.zero_()
    grid, sizes = _blocks(logit_TE)
    sizes |= {"K": top_k, "K_PADDED": _power_of_2(top_k), "RENORMALISE": renormalise}
    _top_k_softmax_fwd_kernel[grid](
        logit_TE.contiguous(), weight_TK, expert_TK, count_E, logit_TE.shape[0], **sizes
    )
    return made


@on_its_device
def launch_top_k_softmax_backward(
    grad_weight_TK: Tensor, logit_TE: Tensor, expert_TK: Tensor, renormalise: bool
) -> Tensor:
    """grad_logit (T, E) of launch_top_k_softmax."""
    grad_logit_TE = _empty_gradient(logit_TE)
    grid, sizes = _blocks(logit_TE)
    sizes |= {"K": expert_TK.shape[1], "RENORMALISE": renormalise}
    _top_k_softmax_bwd_kernel[grid](
        grad_weight_TK.contiguous(), logit_TE.contiguous(), expert_TK.contiguous(), grad_logit_TE,
        logit_TE.shape[0], **sizes,
    )  # fmt: skip
    return grad_logit_TE


def _blocks(logit_TE: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    num_tokens, num_experts = logit_TE.shape
    padded = _power_of_2(num_experts)
    block = max(1, _ELEMENTS // padded)
    return (-(-num_tokens // block),), {"E": num_experts, "E_PADDED": padded, "BLOCK_T": block}


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _empty(logit_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logit_TE.shape
    return (
        logit_TE.new_empty((num_tokens, top_k), dtype=torch.float32),
        logit_TE.new_empty((num_tokens, top_k), dtype=torch.int64),
        logit_TE.new_empty(num_experts, dtype=torch.int64),
    )


def _empty_gradient(logit_TE: Tensor) -> Tensor:
    return torch.empty_like(logit_TE, memory_format=torch.contiguous_format)


@torch.library.custom_op("phi_kernels::sparsemixer", mutates_args=())
def _mixer_op(
    logit_TE: Tensor, threshold: float, sample_TKE: Tensor | None, heun_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_sparsemixer(logit_TE, threshold, sample_TKE, heun_TK)


@_mixer_op.register_fake
def _(logit_TE, threshold, sample_TKE, heun_TK):
    return _empty(logit_TE, 2)


@torch.library.custom_op("phi_kernels::sparsemixer_backward", mutates_args=())
def _mixer_backward_op(
    grad_weight_TK: Tensor, logit_TE: Tensor, expert_TK: Tensor, threshold: float
) -> Tensor:
    return launch_sparsemixer_backward(grad_weight_TK, logit_TE, expert_TK, threshold)


@_mixer_backward_op.register_fake
def _(grad_weight_TK, logit_TE, expert_TK, threshold):
    return _empty_gradient(logit_TE)


@torch.library.custom_op("phi_kernels::top_k_softmax", mutates_args=())
def _top_k_op(logit_TE: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    return launch_top_k_softmax(logit_TE, top_k, renormalise)


@_top_k_op.register_fake
def _(logit_TE, top_k, renormalise):
    return _empty(logit_TE, top_k)


@torch.library.custom_op("phi_kernels::top_k_softmax_backward", mutates_args=())
def _top_k_backward_op(
    grad_weight_TK: Tensor, logit_TE: Tensor, expert_TK: Tensor, renormalise: bool
) -> Tensor:
    return launch_top_k_softmax_backward(grad_weight_TK, logit_TE, expert_TK, renormalise)


@_top_k_backward_op.register_fake
def _(grad_weight_TK, logit_TE, expert_TK, renormalise):
    return _empty_gradient(logit_TE)


def _save_mixer(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.threshold = inputs[1]
    ctx.set_materialize_grads(False)  # else zeros are made for the integers


def _mixer_gradient(ctx, grad_weight_TK, *_):
    return _mixer_backward_op(grad_weight_TK, *ctx.saved_tensors, ctx.threshold), None, None, None


def _save_top_k(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.renormalise = inputs[2]
    ctx.set_materialize_grads(False)


def _top_k_gradient(ctx, grad_weight_TK, *_):
    return _top_k_backward_op(grad_weight_TK, *ctx.saved_tensors, ctx.renormalise), None, None


_mixer_op.register_autograd(_mixer_gradient, setup_context=_save_mixer)
_top_k_op.register_autograd(_top_k_gradient, setup_context=_save_top_k)


def sparsemixer(
    logit_TE: Tensor,
    *,
    threshold: float,
    sample_TKE: Tensor | None = None,
    heun_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as reference.sparsemixer: weight_TK, expert_TK and count_E of two choices."""
    if logit_TE.shape[1] < 2:
        raise ValueError("sparsemixer chooses 2 experts and got logits of 1; use top_k_softmax")
    if not runs_triton(logit_TE):
        return reference.sparsemixer(
            logit_TE, threshold=threshold, sample_TKE=sample_TKE, heun_TK=heun_TK
        )
    return _mixer_op(logit_TE, threshold, sample_TKE, heun_TK)


def top_k_softmax(
    logit_TE: Tensor, *, top_k: int, renormalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as reference.top_k_softmax: weight_TK, expert_TK and count_E of K choices."""
    if not 1 <= top_k <= logit_TE.shape[1]:
        raise ValueError(f"top_k is {top_k}; with {logit_TE.shape[1]} experts it is 1 to that many")
    if not runs_triton(logit_TE):
        return reference.top_k_softmax(logit_TE, top_k=top_k, renormalise=renormalise)
    return _top_k_op(logit_TE, top_k, renormalise)
