"""Evaluation against a loop that runs every piece of a document by itself."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from moe.data.loader import evaluated_documents
from moe.data.shards import TokenSplit, open_split
from moe.evaluate import evaluate
from moe.model.transformer import Transformer, build_model
from moe.model_config import ModelConfig
from moe.parallel.processes import Processes

SEQ_LEN, BATCH_SIZE = 32, 5
ALONE = Processes(0, 1, torch.device("cpu"))
NANO = ModelConfig(
    name="nano", vocab_size=640, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=16, intermediate_size=16, num_experts=4, top_k=2, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def split(short_documents: Path) -> TokenSplit:
    return open_split(short_documents, "validation", verify=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(NANO, seed=2)


def evaluated(model: Transformer, split: TokenSplit, **changes) -> dict[str, float]:
    arguments = {
        "seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "max_tokens": 0, "precision": torch.float32,
        "processes": ALONE,
    }  # fmt: skip
    return evaluate(model, split, **{**arguments, **changes})


@dataclass(frozen=True)
class Predicted:
    """One label: its domain's name, its token, and what the model paid for it."""

    domain: str
    token: int
    nats: float


@torch.no_grad()
def one_by_one(model: Transformer, split: TokenSplit, *, max_tokens: int) -> list[Predicted]:
    """Cut the documents, one after another, every SEQ_LEN tokens; run each piece alone."""
    model.eval()
    place, found = 0, []
    for document in evaluated_documents(split, max_tokens=max_tokens):
        ids = split.tokens(document).tolist()
        domain = split.domains[split.documents["domain"][document]]
        start = 0
        while start < len(ids):
            length = min(SEQ_LEN - place % SEQ_LEN, len(ids) - start)
            logits = model(torch.tensor([ids[start : start + length]])).logits[0].double()
            for offset, log_p in enumerate(logits.log_softmax(dim=-1)):
                if start + offset + 1 < len(ids):
                    token = ids[start + offset + 1]
                    found.append(Predicted(domain, token, -log_p[token].item()))
            start, place = start + length, place + length
    model.train()
    return found


def expected_record(
    predicted: list[Predicted], split: TokenSplit, *, max_tokens: int
) -> dict[str, float]:
    chosen = split.documents[evaluated_documents(split, max_tokens=max_tokens)]
    size = Counter()
    for row in chosen:
        size[split.domains[row["domain"]]] += int(row["bytes"])
    nats, num = math.fsum(p.nats for p in predicted), len(predicted)
    counts = Counter(p.token for p in predicted)
    entropy = -math.fsum(c / num * math.log(c / num) for c in counts.values())
    record = {
        "validation/loss": nats / num,
        "validation/perplexity": math.exp(nats / num),
        "validation/bits_per_byte": nats / math.log(2) / size.total(),
        "validation/unigram_entropy": entropy,
        "validation/unigram_bits_per_byte": entropy * num / math.log(2) / size.total(),
        "validation/tokens": num,
    }
    for domain in split.domains:
        own = [p.nats for p in predicted if p.domain == domain]
        record[f"validation/loss/{domain}"] = math.fsum(own) / len(own)
        record[f"validation/bits_per_byte/{domain}"] = math.fsum(own) / math.log(2) / size[domain]
    return record


@pytest.mark.parametrize("max_tokens", [0, 700])
def test_every_number_agrees_with_documents_run_piece_by_piece(
    model: Transformer, split: TokenSplit, max_tokens: int
) -> None:
    predicted = one_by_one(model, split, max_tokens=max_tokens)
    expected = expected_record(predicted, split, max_tokens=max_tokens)
    assert len({p.domain for p in predicted}) == 3
    assert evaluated(model, split, max_tokens=max_tokens) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_batch_size_and_its_padding_change_nothing(
    model: Transformer, split: TokenSplit, batch_size: int
) -> None:
    one = evaluated(model, split, batch_size=batch_size)
    assert one == pytest.approx(evaluated(model, split), rel=1e-6)


def test_ranks_divide_the_windows_and_their_sums_are_one_processs(
    model: Transformer, split: TokenSplit
) -> None:
    # sums are collected rank by rank; real processes do the same in test_data_parallel.py
    collected: list[torch.Tensor] = []

    @dataclasses.dataclass(frozen=True)
    class Rank(Processes):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            collected.append(tensor)
            return torch.stack(collected).sum(dim=0)

    ranks = [Rank(rank, 3, torch.device("cpu")) for rank in range(3)]
    records = [evaluated(model, split, batch_size=2, processes=rank) for rank in ranks]
    assert len(collected) == 3
    assert records[-1] == pytest.approx(evaluated(model, split), rel=1e-6)
    assert records[0]["validation/tokens"] < records[-1]["validation/tokens"]


def test_a_model_in_training_stays_in_training_and_draws_no_random_number(
    model: Transformer, split: TokenSplit
) -> None:
    before = torch.get_rng_state()
    model.train()
    evaluated(model, split, max_tokens=100)
    assert model.training
    model.eval()
    evaluated(model, split, max_tokens=100)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_that_knows_nothing_pays_the_logarithm_of_its_vocabulary(
    split: TokenSplit,
) -> None:
    model = build_model(NANO, seed=2)
    torch.nn.init.zeros_(model.head.weight)
    record = evaluated(model, split)
    assert record["validation/loss"] == pytest.approx(math.log(640))
    assert record["validation/perplexity"] == pytest.approx(640, rel=1e-5)
