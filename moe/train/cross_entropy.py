"""Cross-entropy in float32 without a float32 copy of the logits.

The logits of a batch are its largest tensor (16,384 tokens x 32,064 rows: 1 GiB in bfloat16). The
usual way makes three more of twice that size; here rows are widened a few hundred at a time, in the
forward pass and again in the backward pass. Nothing is approximated: sums and exponentials are
float32, the gradient is rounded once, to the logits' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**23  # 32 MiB of float32: enough for a device to do at once, little to hold


def cross_entropy(logits_TV: Tensor, label_T: Tensor, *, ignored: int) -> Tensor:
    """Return float32 (T,) losses in nats; 0, without gradient, where the label is `ignored`."""
    return _CrossEntropy.apply(logits_TV, label_T, ignored)


class _CrossEntropy(torch.autograd.Function):
    """loss = logsumexp(s) - s[label]; dloss/ds = softmax(s) - onehot(label)."""

    @staticmethod
    def forward(ctx, logits_TV, label_T, ignored):
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        is_real_T = label_T != ignored
        index_T1 = label_T.masked_fill(~is_real_T, 0)[:, None]
        total_T = torch.empty(label_T.shape, dtype=wide, device=logits_TV.device)
        picked_T = torch.empty_like(total_T)
        for rows in _chunks(logits_TV):
            score = logits_TV[rows].to(wide)
            total_T[rows] = score.logsumexp(dim=-1)
            picked_T[rows] = score.gather(1, index_T1[rows]).squeeze(1)
        ctx.save_for_backward(logits_TV, total_T, index_T1, is_real_T)
        return (total_T - picked_T).masked_fill(~is_real_T, 0.0)

    @staticmethod
    def backward(ctx, grad_T):
        logits_TV, total_T, index_T1, is_real_T = ctx.saved_tensors
        weight_T1 = grad_T.masked_fill(~is_real_T, 0.0)[:, None]
        grad_TV = torch.empty_like(logits_TV)
        for rows in _chunks(logits_TV):
            # a new tensor: where the dtype is wide already, the chunk is the logits themselves
            slope = (logits_TV[rows].to(total_T.dtype) - total_T[rows, None]).exp_()
            slope.mul_(weight_T1[rows])
            slope.scatter_add_(1, index_T1[rows], -weight_T1[rows])
            grad_TV[rows] = slope
        return grad_TV, None, None


def _chunks(logits_TV: Tensor) -> list[slice]:
    num_rows, width = logits_TV.shape
    size = max(1, _CHUNK_ELEMENTS // width)
    return [slice(start, start + size) for start in range(0, num_rows, size)]
