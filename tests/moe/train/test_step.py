"""A step's loss terms against Python floats, and accumulation against one big batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe.config import ExpertsConfig, RouterConfig
from moe.data.packing import Batch
from moe.model.transformer import Transformer, build_model
from moe.model_config import ModelConfig
from moe.sparse.noise import token_keys
from moe.sparse.router import Routing
from moe.train.step import LossTerms, loss_terms, routing_summary, rows_hash

SEED, SEQ_LEN, NUM_ROWS = 7, 24, 4
NANO = ModelConfig(
    name="nano", vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, intermediate_size=8, num_experts=4, top_k=2, initializer_range=0.3,
)  # fmt: skip
ROUTER = RouterConfig(balance_coef=0.5, z_coef=0.25)


@pytest.fixture(scope="module")
def model() -> Transformer:
    built = build_model(NANO, ROUTER, ExpertsConfig(backend="reference"), seed=1)
    return built.train()


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Four rows of two documents each: 23, 22, 17 and 4 labels, and padding behind the last two."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(64, (NUM_ROWS, SEQ_LEN), generator=generator)
    labels = torch.randint(64, (NUM_ROWS, SEQ_LEN), generator=generator)
    document = torch.zeros(NUM_ROWS, SEQ_LEN, dtype=torch.int64)
    position = torch.arange(SEQ_LEN).expand(NUM_ROWS, -1).clone()
    for row, (cut, end) in enumerate([(24, 24), (10, 24), (10, 19), (3, 6)]):
        document[row, cut:], document[row, end:] = 1, -1
        position[row, cut:] -= cut
        position[row, end:] = 0
        labels[row, cut - 1] = labels[row, end - 1] = -100
        labels[row, end:] = -100
    domain = document.clamp(max=0)
    return Batch(tokens, labels, position, document, domain, sample=torch.arange(40, 44))


def terms_of(
    model: Transformer,
    batch: Batch,
    *,
    num_labels: int,
    router: RouterConfig = ROUTER,
    num_ranks: int = 1,
    num_micro: int = 1,
) -> LossTerms:
    return loss_terms(
        model, batch, router=router, seed=SEED, num_labels=torch.tensor(float(num_labels)),
        num_ranks=num_ranks, num_micro=num_micro, precision=torch.float32, reduce=lambda x: x,
    )  # fmt: skip


def count_labels(batch: Batch) -> int:
    return sum(label != -100 for row in batch.labels.tolist() for label in row)


def log_sum_exp(row: list[float]) -> float:
    return max(row) + math.log(math.fsum(math.exp(value - max(row)) for value in row))


def oracle(
    logits: list[list[float]], routings: list[tuple[list, list]], batch: Batch
) -> dict[str, float]:
    """Cross-entropy over labels, balance and z over real tokens; Python floats, no tensors."""
    labels = [label for row in batch.labels.tolist() for label in row]
    is_real = [number >= 0 for row in batch.document.tolist() for number in row]
    cross_entropy = math.fsum(
        log_sum_exp(row) - row[label]
        for row, label in zip(logits, labels, strict=True)
        if label != -100
    )
    balances, z_terms, num_real = [], [], sum(is_real)
    for scores, choices in routings:
        real = [(s, c) for s, c, keep in zip(scores, choices, is_real, strict=True) if keep]
        num_experts = len(scores[0])
        mass = [
            math.fsum(math.exp(s[e] - log_sum_exp(s)) for s, _ in real) / num_real
            for e in range(num_experts)
        ]
        hits = [sum(e in chosen for _, chosen in real) / num_real for e in range(num_experts)]
        balances.append(num_experts * math.fsum(h * m for h, m in zip(hits, mass, strict=True)))
        z_terms.append(math.fsum(log_sum_exp(s) ** 2 for s, _ in real) / num_real)
    return {
        "cross_entropy_sum": cross_entropy,
        "balance": math.fsum(balances) / len(balances),
        "z": math.fsum(z_terms) / len(z_terms),
    }


@pytest.fixture(scope="module")
def expected(model: Transformer, batch: Batch) -> dict[str, float]:
    """The oracle on what the model gives for the same keys."""
    output = model(
        batch.tokens,
        position_BS=batch.position,
        document_BS=batch.document,
        key_BS=token_keys(SEED, batch.sample, seq_len=SEQ_LEN),
    )
    routings = [(r.logit_TE.tolist(), r.expert_TK.tolist()) for r in output.routings]
    return oracle(output.logits.flatten(0, 1).tolist(), routings, batch)


def test_every_term_agrees_with_the_oracle_with_ignored_labels_and_padding(
    model: Transformer, batch: Batch, expected: dict[str, float]
) -> None:
    num_labels = count_labels(batch)
    assert (num_labels, int((batch.document >= 0).sum())) == (66, 73)
    terms = terms_of(model, batch, num_labels=num_labels)
    for name, value in expected.items():
        assert getattr(terms, name).item() == pytest.approx(value, rel=1e-6), name
    total = expected["cross_entropy_sum"] / num_labels
    total += ROUTER.balance_coef * expected["balance"] + ROUTER.z_coef * expected["z"]
    assert terms.total.item() == pytest.approx(total, rel=1e-6)
    assert terms.total.requires_grad
    assert not terms.cross_entropy_sum.requires_grad


def test_cross_entropy_is_shared_over_ranks_and_the_rest_over_micro_batches(
    model: Transformer, batch: Batch, expected: dict[str, float]
) -> None:
    terms = terms_of(model, batch, num_labels=500, num_ranks=4, num_micro=3)
    total = expected["cross_entropy_sum"] * 4 / 500
    total += (ROUTER.balance_coef * expected["balance"] + ROUTER.z_coef * expected["z"]) / 3
    assert terms.total.item() == pytest.approx(total, rel=1e-6)


def half(batch: Batch, rows: slice) -> Batch:
    names = ("tokens", "labels", "position", "document", "domain", "sample")
    return Batch(**{name: getattr(batch, name)[rows] for name in names})


def gradients(model: Transformer, batches: list[Batch], router: RouterConfig) -> dict:
    num_labels = sum(count_labels(batch) for batch in batches)
    for batch in batches:
        terms = terms_of(model, batch, num_labels=num_labels, router=router, num_micro=len(batches))
        terms.total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_two_micro_batches_with_unequal_labels_have_the_gradient_of_one_big_batch(
    model: Transformer, batch: Batch
) -> None:
    # without balance and z: those are means over micro-batches, another number by definition
    router = replace(ROUTER, balance_coef=0.0)
    router = replace(router, z_coef=0.0)
    halves = [half(batch, slice(0, 2)), half(batch, slice(2, 4))]
    assert [count_labels(part) for part in halves] == [45, 21]  # a mean of means would differ
    big, accumulated = gradients(model, [batch], router), gradients(model, halves, router)
    assert big.keys() == accumulated.keys()
    for name, gradient in big.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-5, atol=1e-7)


def test_equal_micro_batches_add_up_to_the_balance_and_z_of_one(
    model: Transformer, batch: Batch
) -> None:
    first = half(batch, slice(0, 2))
    once, twice = gradients(model, [first], ROUTER), gradients(model, [first, first], ROUTER)
    for name, gradient in once.items():
        torch.testing.assert_close(twice[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_dense_model_has_no_balance_no_z_and_an_empty_load(batch: Batch) -> None:
    dense = build_model(replace(NANO, num_experts=0), seed=1).train()
    terms = terms_of(dense, batch, num_labels=66)
    assert (terms.balance.item(), terms.z.item()) == (0.0, 0.0)
    assert terms.total.item() == pytest.approx(terms.cross_entropy_sum.item() / 66)
    assert terms.load_LE.shape == (0, 0)
    assert terms.entropy_L.shape == (0,)


def test_load_and_entropy_leave_padding_out() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(5), 0.0, 0.0, 0.0], [9.0, 9.0, 0, 0]])
    experts = torch.tensor([[0, 1], [0, 2], [3, 3]])
    routing = Routing(torch.ones(3, 2), experts, logits, torch.tensor([2, 1, 1, 2]))
    load_LE, entropy_L = routing_summary((routing,), torch.tensor([True, True, False]))
    assert load_LE.tolist() == [[2.0, 1.0, 1.0, 0.0]]
    second = -(5 / 8 * math.log(5 / 8) + 3 / 8 * math.log(1 / 8))
    assert entropy_L.tolist() == pytest.approx([(math.log(4) + second) / 2])


def test_the_hash_of_rows_depends_on_every_token_and_on_no_layout(batch: Batch) -> None:
    whole = rows_hash(batch)
    assert whole == rows_hash(half(batch, slice(0, 1))) + rows_hash(half(batch, slice(1, 4)))
    order = torch.tensor([2, 0, 3, 1])
    assert rows_hash(half(batch, order)) == whole  # type: ignore[arg-type]
    swapped = replace(batch, sample=batch.sample[order])
    assert rows_hash(swapped) != whole  # the same tokens, in other rows of the run
    for row in range(NUM_ROWS):
        for column in (0, 11, SEQ_LEN - 1):
            tokens = batch.tokens.clone()
            tokens[row, column] ^= 1
            assert rows_hash(replace(batch, tokens=tokens)) != whole
