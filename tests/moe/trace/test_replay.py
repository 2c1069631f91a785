"""Replaying a trace: the same bits, other experts change them, an expert can be taken away."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.data.shards import TokenSplit
from moe.errors import ConfigError
from moe.load_run import LoadedRun
from moe.sparse.forced import Forced
from moe.trace.ablate import ablation_losses
from moe.trace.batch import join_rows
from moe.trace.documents import choose_documents, load_batch
from moe.trace.read import Trace, open_trace
from moe.trace.replay import replay_batches, without_expert

WINDOW = {"seq_len": 64, "max_tokens": 0, "batch_size": 4, "domains": ()}


@torch.no_grad()
def test_a_replayed_trace_gives_the_same_logits_bit_for_bit(
    traced: Trace, run: LoadedRun, split: TokenSplit
) -> None:
    replayed = list(replay_batches(traced, run.config.model))
    batches = choose_documents(split, **WINDOW)
    assert len(replayed) == len(batches) > 10
    for batch, numbers_B in zip(replayed, batches, strict=True):
        tokens_BS, _ = load_batch(split, numbers_B, seq_len=64)
        plain = run.model(tokens_BS, position_BS=batch.position_BS)
        assert torch.equal(batch.tokens_BS, tokens_BS)
        assert batch.document_BS[:, 0].tolist() == numbers_B.tolist()
        output = run.model(batch.tokens_BS, position_BS=batch.position_BS, forced=batch.forced)
        assert torch.equal(output.logits, plain.logits)


@torch.no_grad()
def test_the_routing_of_another_model_changes_the_logits_and_is_what_is_used(
    traced: Trace, run: LoadedRun, trace_it, make_run, tmp_path: Path
) -> None:
    trace_it(tmp_path / "a", of=make_run(seed=1))
    other = next(replay_batches(open_trace(tmp_path / "a"), run.config.model))
    output = run.model(other.tokens_BS, forced=other.forced)
    own = next(replay_batches(traced, run.config.model))
    plain = run.model(own.tokens_BS, forced=own.forced)
    assert torch.equal(own.tokens_BS, other.tokens_BS)
    difference = (output.logits - plain.logits).abs().amax(dim=-1)[own.valid_BS]
    assert (difference > 1e-3).float().mean() > 0.9
    valid_T = own.valid_BS.flatten()
    for routing, forced in zip(output.routings, other.forced, strict=True):
        assert torch.equal(routing.expert_TK[valid_T], forced.expert_TK[valid_T])


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batches_of_another_size_hold_the_same_rows(
    traced: Trace, run: LoadedRun, batch_size: int
) -> None:
    rows = join_rows(list(traced.batches()))
    tokens, experts = [], []
    for batch in replay_batches(traced, run.config.model, batch_size=batch_size):
        valid_T = batch.valid_BS.flatten()
        tokens.append(batch.tokens_BS.flatten()[valid_T])
        layers = torch.stack([forced.expert_TK[valid_T] for forced in batch.forced], dim=1)
        experts.append(layers)
        assert all((f.expert_TK[~valid_T] == -1).all() for f in batch.forced)
    assert torch.cat(tokens).tolist() == rows.token_T.tolist()
    assert np.array_equal(torch.cat(experts).numpy(), rows.expert_TLK)


def test_documents_that_lie_across_reads_stay_whole(
    traced: Trace, run: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [b.document_BS[:, 0].tolist() for b in replay_batches(traced, run.config.model)]
    plain = Trace.batches

    def in_small_pieces(self, columns=None, *, max_rows=7, **others):
        return plain(self, columns, max_rows=7, **others)

    monkeypatch.setattr(Trace, "batches", in_small_pieces)
    cut = [b.document_BS[:, 0].tolist() for b in replay_batches(traced, run.config.model)]
    assert cut == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "with num_layers=3; model nano has 2"),
        ({"num_experts": 4}, "with num_experts=5; model nano has 4"),
        ({"num_experts": 0}, "nano is dense"),
        ({"vocab_size": 64}, "token ids beyond model nano's 64"),
    ],
)
def test_a_trace_of_a_model_of_another_shape_is_refused(
    traced: Trace, run: LoadedRun, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        next(replay_batches(traced, dataclasses.replace(run.config.model, **changes)))


def test_an_expert_is_taken_away_by_weights_of_0() -> None:
    forced = Forced(torch.tensor([[0, 1], [1, 2], [-1, -1]]), torch.full((3, 2), 0.5))
    result = without_expert(forced, 1)
    assert torch.equal(result.expert_TK, forced.expert_TK)
    assert result.weight_TK.tolist() == [[0.5, 0.0], [0.0, 0.5], [0.5, 0.5]]


@torch.no_grad()
def test_ablation_losses_are_those_of_a_model_whose_expert_answers_nothing(
    traced: Trace, run: LoadedRun
) -> None:
    ablated = [(0, 1), (2, 4)]
    measured = ablation_losses(run.model, traced, ablated=ablated)
    rows = join_rows(list(traced.batches(["token", "document", "domain"])))
    for number, (layer, expert) in enumerate([*ablated, (None, None)]):
        down = None
        if layer is not None:
            down = run.model.blocks[layer].feed_forward.experts.down[expert]
            kept = down.clone()
            down.zero_()
        expected = []
        for document in dict.fromkeys(rows.document_T.tolist()):
            ids = torch.from_numpy(rows.token_T[rows.document_T == document].astype(np.int64))
            log_p = run.model(ids[None]).logits[0, :-1].log_softmax(dim=-1)
            expected.append(-log_p.gather(1, ids[1:, None])[:, 0])
        if down is not None:
            down.copy_(kept)
        found = measured.loss_T if layer is None else measured.ablated_AT[number]
        assert np.allclose(found, torch.cat(expected), atol=1e-4)
    is_first = np.diff(rows.document_T, prepend=-1) != 0
    assert np.array_equal(measured.document_T, rows.document_T[~is_first])
    assert np.array_equal(measured.domain_T, rows.domain_T[~is_first])
    assert not np.allclose(measured.ablated_AT[0], measured.loss_T)


def test_an_expert_that_is_not_there_cannot_be_ablated(traced: Trace, run: LoadedRun) -> None:
    with pytest.raises(ConfigError, match="got layer 0, expert 5; allowed: layers 0 to 2"):
        ablation_losses(run.model, traced, ablated=[(0, 5)])
