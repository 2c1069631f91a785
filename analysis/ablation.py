"""What a model loses, by domain, when an expert is taken away: from losses of the same tokens.

The arithmetic only: who ran the model with and without the expert gives the losses of each token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.bootstrap import Interval, bootstrap

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class AblationEffect:
    """Mean loss with the expert taken away less mean loss without; nats per token; above 0 is harm.

    A ablations, D domains. exp(effect) is the factor by which perplexity grows.
    """

    by_domain: Interval  # (A, D); NaN for a domain without tokens
    overall: Interval  # (A,) over all tokens
    selectivity: Interval  # (A, D) effect on the domain less that on the tokens of all others
    token_D: NDArray[np.int64]
    document_D: NDArray[np.int64]


def ablation_effect(
    loss_T: NDArray[np.floating],
    ablated_loss_AT: NDArray[np.floating],
    *,
    domain_T: NDArray[np.integer],
    document_T: NDArray[np.integer],
    num_domains: int,
    num_samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> AblationEffect:
    """Effects of A ablations with intervals; tokens without a loss (NaN in loss_T) are left out.

    Losses are paired token by token, so what makes a document hard falls out; whole documents are
    drawn again within their domain. A domain is selective for an expert where `selectivity`
    excludes zero, not where one domain's interval excludes zero and another's does not. Raises
    ValueError for arrays that do not fit, a document in two domains, and an ablated loss missing
    where there is one to compare with.
    """
    _check(loss_T, ablated_loss_AT, domain_T, document_T, num_domains)
    has_loss_T = ~np.isnan(loss_T)
    if not np.isfinite(ablated_loss_AT[:, has_loss_T]).all():
        raise ValueError("ablated_loss_AT: holds non-finite losses of tokens that loss_T has.")
    effect_AT = ablated_loss_AT[:, has_loss_T].astype(np.float64) - loss_T[has_loss_T]
    document, row, cluster_T = np.unique(
        document_T[has_loss_T], return_index=True, return_inverse=True
    )
    domain_C = domain_T[has_loss_T][row].astype(np.int64)
    if not np.array_equal(domain_C[cluster_T], domain_T[has_loss_T]):
        raise ValueError("domain_T: a document has tokens in two domains; give it two numbers.")
    token_C = np.bincount(cluster_T, minlength=len(document))
    sum_CA = np.stack(
        [np.bincount(cluster_T, effect_T, minlength=len(document)) for effect_T in effect_AT],
        axis=1,
    )
    is_in_CD = domain_C[:, None] == np.arange(num_domains)
    sums = [sum_CA[:, :, None] * is_in_CD[:, None], token_C[:, None] * is_in_CD]

    def interval(statistic: object) -> Interval:
        return bootstrap(
            sums,
            statistic,  # type: ignore[arg-type]
            stratum_C=domain_C,
            num_samples=num_samples,
            level=level,
            seed=seed,
        )

    return AblationEffect(
        by_domain=interval(_by_domain),
        overall=interval(lambda total, token: _ratio(total.sum(-1), token.sum(-1)[:, None])),
        selectivity=interval(_selectivity),
        token_D=np.bincount(domain_T[has_loss_T], minlength=num_domains),
        document_D=np.bincount(domain_C, minlength=num_domains),
    )


def _by_domain(total_RAD: Floats, token_RD: Floats) -> Floats:
    return _ratio(total_RAD, token_RD[:, None])


def _selectivity(total_RAD: Floats, token_RD: Floats) -> Floats:
    others_RAD = total_RAD.sum(axis=-1, keepdims=True) - total_RAD
    others_RD = token_RD.sum(axis=-1, keepdims=True) - token_RD
    return _by_domain(total_RAD, token_RD) - _ratio(others_RAD, others_RD[:, None])


def _ratio(total: Floats, token: Floats) -> Floats:
    token = np.broadcast_to(token, total.shape)
    return np.divide(total, token, out=np.full_like(total, np.nan), where=token > 0)


def _check(
    loss_T: NDArray, ablated_loss_AT: NDArray, domain_T: NDArray, document_T: NDArray,
    num_domains: int,
) -> None:  # fmt: skip
    sizes = {loss_T.shape, ablated_loss_AT.shape[1:], domain_T.shape, document_T.shape}
    if loss_T.ndim != 1 or ablated_loss_AT.ndim != 2 or len(sizes) != 1:
        raise ValueError(
            f"ablation: loss_T {loss_T.shape}, ablated_loss_AT {ablated_loss_AT.shape}, domain_T "
            f"{domain_T.shape}, document_T {document_T.shape}; these must be (T,), (A, T), (T,), "
            "(T,)."
        )
    if len(domain_T) and not 0 <= domain_T.min() <= domain_T.max() < num_domains:
        raise ValueError(f"domain_T: holds numbers outside 0 to {num_domains - 1}.")
    if np.isinf(loss_T).any() or np.isnan(loss_T).all():
        raise ValueError("loss_T: has no finite loss, or an infinite one.")
