"""Everything the page says of one expert of one layer, looked up in the index of a trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.balance import domain_share
from analysis.co_activation import chance_pairs
from analysis.explore.examples import NOTHING
from analysis.explore.index import TraceIndex
from analysis.key_counts import NUM_POSITION_BUCKETS, first_position
from analysis.routing_counts import RoutingCounts
from analysis.specialisation import lift, top_keys
from analysis.utilisation import load_ratio

NUM_TOKENS = 12
LEAST_COUNT = 20  # of a token id to be ranked by lift, if the trace is large enough for it


@dataclass(frozen=True)
class TokenRow:
    """A token id, of the tokens whose first choice is counted."""

    token: int
    num_first: int  # tokens of this id whose first choice the expert was
    num_tokens: int  # of this id
    lift: float  # its share of the id's tokens over its share of all


@dataclass(frozen=True)
class DomainRow:
    """Of a domain's tokens, the part that chose the expert, with a 95 % interval over documents."""

    name: str
    num_tokens: int
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class PartnerRow:
    """Another expert of the layer: of the expert's tokens, the part that chose it too."""

    expert: int
    share: float
    chance: float  # the part that the loads alone give


@dataclass(frozen=True)
class PositionRow:
    """A range of positions in the document: lift of the first choice there."""

    first: int
    last: int | None  # None: to the end
    num_tokens: int
    lift: float


@dataclass(frozen=True)
class Example:
    """A token that the expert took, at `centre` of what stands around it."""

    weight: float
    domain: str
    document: int
    position: int
    step: int
    tokens: tuple[int, ...]
    experts: tuple[int, ...]  # each token's first choice in the layer
    centre: int


@dataclass(frozen=True)
class Expert:
    """Rows in the order shown: the strongest first, but domains and positions as they are."""

    layer: int
    expert: int
    num_tokens: int  # that chose it, among all K choices
    num_first: int
    load: float  # times the even share
    weight: float  # mean
    even_share: float  # K / E
    least_count: int
    by_lift: tuple[TokenRow, ...]
    by_count: tuple[TokenRow, ...]
    domains: tuple[DomainRow, ...]
    partners: tuple[PartnerRow, ...]
    positions: tuple[PositionRow, ...]
    examples: tuple[Example, ...]


def describe_expert(index: TraceIndex, *, layer: int, expert: int) -> Expert:
    """Look an expert up; ValueError for one that the model does not have."""
    info = index.info
    if not (0 <= layer < info.num_layers and 0 <= expert < info.num_experts):
        raise ValueError(f"layer {layer}, expert {expert}: the trace has no such expert.")
    counts = index.routing
    load_E = counts.load_LE[layer]
    table_XE = index.of_layer("tokens/choice_LXE", layer)
    token_X = index.array("tokens/token_X")
    least = max(1, min(LEAST_COUNT, index.num_tokens // 2000))
    by_lift, by_count = _tokens(table_XE, token_X, expert=expert, least=least)
    taken = int(load_E[expert])
    return Expert(
        layer=layer,
        expert=expert,
        num_tokens=taken,
        num_first=int(counts.choice_LKE[layer, 0, expert]),
        load=float(load_ratio(load_E)[expert]),
        weight=float(counts.weight_LE[layer, expert] / taken) if taken else float("nan"),
        even_share=info.top_k / info.num_experts,
        least_count=least,
        by_lift=by_lift,
        by_count=by_count,
        domains=_domains(index, layer=layer, expert=expert),
        partners=_partners(index.of_layer("pairs/pair_LEE", layer), taken, expert=expert),
        positions=_positions(index, layer=layer, expert=expert),
        examples=_examples(index, layer=layer, expert=expert),
    )


def _tokens(
    table_XE: NDArray, token_X: NDArray, *, expert: int, least: int
) -> tuple[tuple[TokenRow, ...], tuple[TokenRow, ...]]:
    best = top_keys(table_XE, token_X, expert=expert, num_keys=NUM_TOKENS, min_count=least)
    first_X = table_XE[:, expert]
    most = np.argsort(-first_X.astype(np.int64), kind="stable")[:NUM_TOKENS]
    most = most[first_X[most] > 0]
    total_E = table_XE.sum(axis=0, dtype=np.int64)
    usual = total_E[expert] / max(total_E.sum(), 1)

    def row(token: int) -> TokenRow:
        share = first_X[token] / token_X[token]
        return TokenRow(int(token), int(first_X[token]), int(token_X[token]), float(share / usual))

    return tuple(map(row, best.key_N)), tuple(map(row, most))


def _domains(index: TraceIndex, *, layer: int, expert: int) -> tuple[DomainRow, ...]:
    counts = index.routing
    one = slice(layer, layer + 1)
    of_layer = RoutingCounts(
        choice_LDGE=counts.choice_LDGE[one].astype(np.int64),
        token_DG=counts.token_DG.astype(np.int64),
        choice_LKE=counts.choice_LKE[one],
        weight_LE=counts.weight_LE[one],
        num_choices=counts.num_choices,
    )
    share = domain_share(of_layer)
    return tuple(
        DomainRow(
            name, int(counts.token_D[d]), *(float(v[d, 0, expert]) for v in
            (share.estimate, share.low, share.high)),
        )
        for d, name in enumerate(index.info.domains)
        if counts.token_D[d]
    )  # fmt: skip


def _partners(pair_EE: NDArray, taken: int, *, expert: int) -> tuple[PartnerRow, ...]:
    if not taken or not pair_EE[expert].any():
        return ()
    chance_E = chance_pairs(pair_EE)[expert]
    rows = [
        PartnerRow(other, float(pair_EE[expert, other] / taken), float(chance_E[other] / taken))
        for other in range(len(pair_EE))
        if other != expert
    ]
    return tuple(sorted(rows, key=lambda row: (-row.share, row.expert)))


def _positions(index: TraceIndex, *, layer: int, expert: int) -> tuple[PositionRow, ...]:
    table_XE = index.of_layer("positions/choice_LXE", layer)
    lift_X = lift(table_XE)[:, expert]
    token_X = index.array("positions/token_X")
    last = NUM_POSITION_BUCKETS - 1
    return tuple(
        PositionRow(
            first_position(bucket),
            None if bucket == last else first_position(bucket + 1) - 1,
            int(token_X[bucket]),
            float(lift_X[bucket]),
        )
        for bucket in range(NUM_POSITION_BUCKETS)
        if token_X[bucket] and np.isfinite(lift_X[bucket])
    )


def _examples(index: TraceIndex, *, layer: int, expert: int) -> tuple[Example, ...]:
    kept = index.examples(layer)
    found = []
    for n in np.flatnonzero(kept.key_LEN[0, expert]):
        token_C, expert_C = kept.token_LENC[0, expert, n], kept.expert_LENC[0, expert, n]
        inside = token_C != NOTHING
        found.append(
            Example(
                weight=float(kept.weight_LEN[0, expert, n]),
                domain=index.info.domains[kept.domain_LEN[0, expert, n]],
                document=int(kept.document_LEN[0, expert, n]),
                position=int(kept.position_LEN[0, expert, n]),
                step=int(kept.step_LEN[0, expert, n]),
                tokens=tuple(token_C[inside].tolist()),
                experts=tuple(expert_C[inside].tolist()),
                centre=int(inside[: len(inside) // 2].sum()),
            )
        )
    return tuple(found)
