"""Which experts SparseMixer's threshold leaves out, and how often only one is left.

The rule is that of phi_kernels.reference.sparsemixer, written again in numpy so that traces can be
read without torch: of the original scores s and the largest of the stage t, an expert is masked if
(t - s) / max(|s|, t) > 2 * threshold (GRIN, arXiv 2409.12136, Algorithm 3; released code).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats32 = NDArray[np.float32]

NUM_STAGES = 2  # SparseMixer-v2 chooses two experts, one a stage


def num_survivors(
    logit: Floats32, expert: NDArray[np.integer], *, threshold: float
) -> NDArray[np.int64]:
    """(..., E), (..., 2) -> (..., 2): experts left in each stage's softmax, the chosen included.

    expert is what the router chose (it differs from the largest where training sampled): the
    second stage leaves the first choice out. Computed in the logits' own precision, as the router
    does: at the threshold one bit decides. 1 means weight 1 and, at evaluation, no gradient.
    """
    num_experts = logit.shape[-1]
    if expert.shape != (*logit.shape[:-1], NUM_STAGES):
        raise ValueError(
            f"expert: got shape {expert.shape} for logits {logit.shape}; SparseMixer chooses two "
            "experts of each token, so it must be the logits' shape with 2 for E."
        )
    if num_experts < NUM_STAGES:
        raise ValueError(f"logit: got {num_experts} expert; SparseMixer needs at least 2.")
    stages = []
    stage = logit
    for k in range(NUM_STAGES):
        top = stage.max(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            # 0/0 is not a number, which compares as false: it survives
            is_below = (top - logit) / np.maximum(np.abs(logit), top) > 2 * threshold
        stages.append((~is_below & (stage > -np.inf)).sum(axis=-1))
        stage = np.where(np.arange(num_experts) == expert[..., k : k + 1], -np.inf, logit)
        stage = stage.astype(logit.dtype, copy=False)
    return np.stack(stages, axis=-1)


def masked_fraction(
    logit: Floats32, expert: NDArray[np.integer], *, threshold: float
) -> NDArray[np.float64]:
    """(..., E), (..., 2) -> (..., 2): of the experts a stage could choose, the part it masked.

    E experts stand in the first stage, E - 1 in the second: 0 is a plain softmax, 1 - 1/E (then
    1 - 1/(E - 1)) leaves the largest alone.
    """
    left = num_survivors(logit, expert, threshold=threshold)
    return 1.0 - left / (logit.shape[-1] - np.arange(NUM_STAGES))
