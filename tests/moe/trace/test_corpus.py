"""A trace against every document run alone; interrupted, refused, damaged."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe.data.shards import TokenSplit
from moe.errors import ConfigError, DataError
from moe.load_run import LoadedRun
from moe.trace.batch import join_rows
from moe.trace.corpus import model_sha256
from moe.trace.info import read_info, write_info
from moe.trace.read import Trace, open_trace


def rows_of(folder: Path):
    return join_rows(list(open_trace(folder).batches()))


@torch.no_grad()
def test_every_row_is_what_the_model_does_with_its_document_alone(
    traced: Trace, run: LoadedRun, split: TokenSplit
) -> None:
    rows = join_rows(list(traced.batches()))
    seen = set()
    for number in np.unique(rows.document_T):
        member = rows.document_T == number
        ids = split.tokens(int(number))[:64].astype(np.int64)
        assert rows.token_T[member].tolist() == ids.tolist()
        assert rows.position_T[member].tolist() == list(range(len(ids)))
        assert set(rows.domain_T[member]) == {split.documents["domain"][number]}
        routings = run.model(torch.from_numpy(ids)[None]).routings
        for layer, routing in enumerate(routings):
            assert np.array_equal(rows.expert_TLK[member, layer], routing.expert_TK.numpy())
            assert np.allclose(rows.weight_TLK[member, layer], routing.weight_TK, atol=1e-5)
            assert np.allclose(rows.logit_TLE[member, layer], routing.logit_TE, atol=1e-4)
        seen.add(int(number))
    assert seen == set(range(split.num_documents))
    assert (split.documents["tokens"] > 64).any()  # so that something was cut


def test_the_types_are_those_that_analysis_relies_on(traced: Trace) -> None:
    batch = next(iter(traced.batches()))
    kinds = [values.dtype.name for values in batch if values is not None]
    assert kinds == ["int32", "int32", "int64", "int16", "int16", "float32", "float32"]
    assert batch.expert_TLK.shape == (batch.num_rows, 3, 2)
    assert batch.logit_TLE is not None
    assert batch.logit_TLE.shape == (batch.num_rows, 3, 5)
    assert batch.step_T is None


def test_the_counts_of_the_description_are_those_of_the_rows(
    traced: Trace, split: TokenSplit
) -> None:
    rows = join_rows(list(traced.batches()))
    info = traced.info
    assert (info.num_layers, info.num_experts, info.top_k) == (3, 5, 2)
    assert info.num_tokens == rows.num_rows
    assert info.tokens_of_domain == tuple(np.bincount(rows.domain_T, minlength=3).tolist())
    assert info.num_documents == split.num_documents
    assert info.domains == split.domains
    assert info.data_fingerprint == split.manifest.fingerprint
    assert info.steps == ()
    assert len(info.parts) > 3
    assert all(part.num_tokens <= 400 for part in info.parts)
    assert info.forward_seconds > 0


def test_the_batch_size_changes_the_order_of_rows_only(
    traced: Trace, trace_it, tmp_path: Path
) -> None:
    trace_it(tmp_path / "a", batch_size=1, logits=True)
    one, other = rows_of(tmp_path / "a"), join_rows(list(traced.batches()))
    order = [np.lexsort((rows.position_T, rows.document_T)) for rows in (one, other)]
    assert np.array_equal(one.token_T[order[0]], other.token_T[order[1]])
    assert np.array_equal(one.expert_TLK[order[0]], other.expert_TLK[order[1]])


def test_a_budget_is_shared_by_domains_and_counts_cut_documents(trace_it, tmp_path: Path) -> None:
    info = trace_it(tmp_path / "a", max_tokens=900, seq_len=20).info
    assert 900 <= info.num_tokens < 920
    assert max(info.tokens_of_domain) - min(info.tokens_of_domain) <= 20


def test_chosen_domains_alone_are_traced(trace_it, tmp_path: Path, split: TokenSplit) -> None:
    info = trace_it(tmp_path / "a", domains=("law",)).info
    law = split.domains.index("law")
    member = split.documents["domain"] == law
    assert info.tokens_of_domain[law] == info.num_tokens
    assert info.num_tokens == np.minimum(split.documents["tokens"][member], 64).sum()


class Stop(Exception):
    """An interruption."""


def interrupted_at(place: int, *, folder: Path | None = None) -> Callable[[str, int, int], None]:
    """Stop after so many batches; with a folder, not before a part of it is whole."""
    calls = iter(range(10_000))

    def on_progress(what: str, done: int, total: int) -> None:
        if next(calls) == place:
            for _ in range(2000):
                if folder is None or read_info(folder / "progress.json").parts:
                    break
                time.sleep(0.01)
            raise Stop

    return on_progress


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


def test_an_interrupted_trace_goes_on_and_ends_with_the_same_bytes(
    traced: Trace, trace_it, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    for on_progress in (interrupted_at(0), interrupted_at(6, folder=folder)):
        with pytest.raises(Stop):
            trace_it(folder, logits=True, on_progress=on_progress)
        with pytest.raises(DataError, match="is not finished"):
            open_trace(folder)
        assert not list(folder.glob(".part*"))
    done = trace_it(folder, logits=True)
    assert 0 < done.resumed_tokens < done.info.num_tokens
    assert contents(folder) == contents(traced.folder)
    assert not (folder / "progress.json").exists()


def test_a_finished_trace_is_left_as_it_is(trace_it, tmp_path: Path, hashes) -> None:
    trace_it(tmp_path / "a")
    before = hashes(tmp_path / "a")
    again = trace_it(tmp_path / "a")
    assert again.was_finished
    assert hashes(tmp_path / "a") == before


def test_a_part_damaged_in_between_is_made_again(trace_it, tmp_path: Path, traced: Trace) -> None:
    folder, notes = tmp_path / "a", []
    trace_it(folder, logits=True)
    (folder / "trace.json").rename(folder / "progress.json")  # as if killed just before the end
    parts = sorted(folder.glob("part-*.parquet"))
    raw = bytearray(parts[1].read_bytes())
    raw[len(raw) // 2] ^= 1
    parts[1].write_bytes(raw)
    trace_it(folder, logits=True, notes=notes)
    assert len(notes) == 1
    assert "part-00001.parquet: is damaged" in notes[0]
    assert contents(folder) == contents(traced.folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 50}, "with max_tokens=0; this one has 50"),
        ({"batch_size": 3}, "with batch_size=4; this one has 3"),
        ({"logits": True}, "with logits=false; this one has true"),
        ({"seq_len": 30}, "with seq_len=64; this one has 30"),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_trace_with_other_numbers_in_the_target_is_refused(
    changes: dict, message: str, is_whole: bool, trace_it, tmp_path: Path, hashes
) -> None:
    folder = tmp_path / "a"
    if is_whole:
        trace_it(folder)
    else:
        with pytest.raises(Stop):
            trace_it(folder, on_progress=interrupted_at(3))
    before = hashes(folder)
    with pytest.raises(ConfigError, match=message):
        trace_it(folder, **changes)
    assert hashes(folder) == before


def test_a_trace_of_another_model_in_the_target_is_refused(
    trace_it, make_run, tmp_path: Path
) -> None:
    with pytest.raises(Stop):
        trace_it(tmp_path / "a", on_progress=interrupted_at(3))
    with pytest.raises(ConfigError, match="holds a trace of another model"):
        trace_it(tmp_path / "a", of=make_run(seed=1))


def test_a_trace_of_other_text_in_the_target_is_refused(
    trace_it, split: TokenSplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace_it(tmp_path / "a")
    path = tmp_path / "a" / "trace.json"
    write_info(path, dataclasses.replace(read_info(path), data_fingerprint="f" * 64))
    with pytest.raises(ConfigError, match="holds a trace of another text"):
        trace_it(tmp_path / "a")


def test_a_dense_model_is_refused(trace_it, make_run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model nano is dense: it has no experts"):
        trace_it(tmp_path / "a", of=make_run(num_experts=0))
    assert not (tmp_path / "a").exists()


def test_a_folder_with_something_else_is_refused(trace_it, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"is not empty \(thesis.tex\) and holds no trace"):
        trace_it(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        trace_it(tmp_path / "thesis.tex")


def test_two_processes_do_not_write_one_trace(trace_it, tmp_path: Path) -> None:
    def again(what: str, done: int, total: int) -> None:
        trace_it(tmp_path / "a")

    with pytest.raises(ConfigError, match="another process is writing the trace"):
        trace_it(tmp_path / "a", on_progress=again)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("lwa", ConfigError, "domains: got 'lwa'; .* Did you mean 'law'"),
        ("news", DataError, "domains: 'news' has no documents in the validation split"),
    ],
)
def test_a_domain_that_is_unknown_or_empty_is_refused(
    name: str, error: type[Exception], message: str, trace_it, split, tmp_path, monkeypatch
) -> None:
    keep = split.documents["domain"] != split.domains.index("news")
    monkeypatch.setitem(split.__dict__, "documents", split.documents[keep])
    with pytest.raises(error, match=message):
        trace_it(tmp_path / "a", domains=(name,))


def test_an_empty_domain_that_was_not_asked_for_is_said(
    trace_it, split, tmp_path, monkeypatch
) -> None:
    keep = split.documents["domain"] != split.domains.index("news")
    monkeypatch.setitem(split.__dict__, "documents", split.documents[keep])
    notes: list[str] = []
    trace_it(tmp_path / "a", notes=notes)
    assert notes == ["domain 'news' has no documents in the validation split, so none are traced."]
    with pytest.raises(DataError, match="has no tokens of 'news'"):
        open_trace(tmp_path / "a").domain_number("news")


def test_a_window_beyond_the_models_is_refused(trace_it, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seq_len: got 99999; the model takes at most 4096"):
        trace_it(tmp_path / "a", seq_len=99_999)


def test_the_vocabulary_gives_every_token_its_text(traced: Trace, run: LoadedRun) -> None:
    texts = traced.vocabulary()
    assert texts is not None
    assert len(texts) == 512
    ids = join_rows(list(traced.batches(["token"]))).token_T[1:30]
    shown = "".join(texts[number] for number in ids)
    decoded = run.require_tokenizer().decode(ids.tolist(), keep_special=True)
    assert shown.removeprefix(" ") == decoded
    assert texts[run.require_tokenizer().end_of_text_id] == "<|endoftext|>"


def test_the_hash_of_a_model_is_of_its_numbers_and_its_router(make_run) -> None:
    same, other = make_run(), make_run(seed=1)
    config = dataclasses.replace(
        same.config, router=dataclasses.replace(same.config.router, mask_threshold=0.3)
    )
    hashes = [model_sha256(r) for r in (same, make_run(), other)]
    hashes.append(model_sha256(dataclasses.replace(same, config=config)))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_the_settings_say_what_was_asked_for(traced: Trace) -> None:
    settings = json.loads(traced.info.settings)
    assert settings["split"] == "validation"
    assert settings["seq_len"] == traced.info.setting("seq_len") == 64
    assert settings["precision"] == "float32"
    assert traced.info.setting("nothing") is None
