"""moe/data/prepare.py: the same bytes with any number of processes, and nothing old ever lost."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe.config import DataConfig, PathsConfig, PrepareConfig, TokenizerConfig
from moe.data.manifest import Manifest
from moe.data.prepare import prepare
from moe.data.shards import open_split
from moe.data.tokenizer import Tokenizer
from moe.errors import DataError


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "texts"
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(400)]
    for number in range(40):
        path = folder / ("law" if number % 2 else "news") / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(generator.choices(words, k=generator.randint(20, 200))))
    (folder / "law" / "copy.txt").write_text((folder / "news" / "00.txt").read_text())
    return folder


@pytest.fixture
def config(texts: Path, tmp_path: Path) -> PrepareConfig:
    return PrepareConfig(
        data=DataConfig(sources=(str(texts),), validation_fraction=0.2),
        tokenizer=TokenizerConfig(vocab_size=512),
        paths=PathsConfig(data_dir=str(tmp_path / "data" / "prepared")),
        num_processes=1,
    )


def run(config: PrepareConfig, *, shard_bytes: int = 2**28) -> Manifest:
    return prepare(config, on_progress=lambda what, done, total: None, shard_bytes=shard_bytes)


def content(config: PrepareConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.paths.data_dir).iterdir()}


def left_over(config: PrepareConfig) -> list[str]:
    """Names beside the target, which should be the target alone."""
    target = Path(config.paths.data_dir)
    return sorted(p.name for p in target.parent.iterdir() if p.name != target.name)


def with_data(config: PrepareConfig, **changes: object) -> PrepareConfig:
    data = dataclasses.replace(config.data, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(config, data=data)


def test_one_two_and_four_processes_write_the_same_bytes(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.data.corpus.LEAST_PART_BYTES", 3000)  # about ten parts
    found = []
    for number in (1, 2, 4):
        one = dataclasses.replace(
            config, num_processes=number, paths=PathsConfig(data_dir=str(tmp_path / str(number)))
        )
        run(one, shard_bytes=3000)
        found.append(content(one))
    assert len(found[0]) > 6
    assert found[0] == found[1] == found[2]


def test_duplicates_are_dropped_and_counted(config: PrepareConfig) -> None:
    manifest = run(config)
    assert sum(split.num_documents for split in manifest.splits) == 40
    assert [(s.reason, s.count) for s in manifest.skipped] == [("duplicate", 1)]


def test_both_domains_are_held_out_and_nothing_is_on_both_sides(config: PrepareConfig) -> None:
    run(config)
    sides = []
    for name in ("train", "validation"):
        split = open_split(config.paths.data_dir, name, verify=True)
        assert set(split.documents["domain"].tolist()) == {0, 1}
        sides.append({split.tokens(d).tobytes() for d in range(split.num_documents)})
    assert not sides[0] & sides[1]
    assert 2 <= len(sides[1]) <= 16


def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    generator = random.Random(1)
    for number in range(30):
        # each document has a word of its own, often enough to become a piece where it is seen
        own = "".join(generator.choices("klmnopqrst", k=8))
        words = ["".join(generator.choices("abcdefgh", k=4)) for _ in range(100)]
        (source / f"{number}.txt").write_text(" ".join(words) + f" {own}" * 60)
    config = PrepareConfig(
        data=DataConfig(sources=(str(source),), validation_fraction=0.3),
        tokenizer=TokenizerConfig(vocab_size=1000),
        paths=PathsConfig(data_dir=str(tmp_path / "data")),
        num_processes=1,
    )
    run(config)
    tokenizer = Tokenizer.load(tmp_path / "data" / "tokenizer.model", vocab_size=1000)
    length = {}
    for name in ("train", "validation"):
        split = open_split(config.paths.data_dir, name, verify=True)
        last = [
            tokenizer.decode(split.tokens(d)[1:-1].tolist()).split(" ")[-1]
            for d in range(split.num_documents)
        ]
        length[name] = [len(tokenizer.encode(" " + word)) for word in last]
    assert max(length["train"]) == 1
    assert min(length["validation"]) > 1


def test_max_bytes_cuts_and_says_when_nothing_is_left(config: PrepareConfig) -> None:
    total = sum(split.num_bytes for split in run(config).splits)
    smaller = with_data(config, max_bytes=total // 2)
    smaller = dataclasses.replace(smaller, paths=PathsConfig(config.paths.data_dir + "2"))
    cut = run(smaller)
    assert 0.35 * total < sum(split.num_bytes for split in cut.splits) <= total // 2
    with pytest.raises(DataError, match=r"data\.max_bytes: got 3; .*Raise it"):
        run(dataclasses.replace(with_data(config, max_bytes=3), overwrite=True))


def test_a_loaded_tokenizer_is_copied(config: PrepareConfig, tmp_path: Path) -> None:
    first = run(config)
    model = Path(config.paths.data_dir) / "tokenizer.model"
    loaded = dataclasses.replace(
        config,
        tokenizer=TokenizerConfig(vocab_size=512, model_path=str(model)),
        paths=PathsConfig(data_dir=str(tmp_path / "second")),
    )
    second = run(loaded)
    assert second.fingerprint == first.fingerprint
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size: got 512"):
        run(dataclasses.replace(config, tokenizer=TokenizerConfig(512, str(_bigger(model)))))


def _bigger(model: Path) -> Path:
    """A model with more pieces than the vocabulary has rows."""
    from moe.data.tokenizer_training import train_tokenizer

    text = " ".join(f"w{number * 7919}" for number in range(5000))
    path = model.with_name("bigger.model")
    train_tokenizer([text], vocab_size=600, output_path=path)
    return path


def test_a_vocabulary_beyond_65536_is_stored_in_32_bits(
    config: PrepareConfig, tmp_path: Path
) -> None:
    first = run(config)
    model = str(Path(config.paths.data_dir) / "tokenizer.model")
    wide = dataclasses.replace(
        config,
        tokenizer=TokenizerConfig(vocab_size=70_000, model_path=model),
        paths=PathsConfig(data_dir=str(tmp_path / "wide")),
    )
    assert run(wide).dtype == "uint32"
    assert first.dtype == "uint16"
    narrow = open_split(config.paths.data_dir, "train", verify=True)
    split = open_split(tmp_path / "wide", "train", verify=True)
    assert (split.tokens(3) == narrow.tokens(3)).all()


def test_the_same_configuration_is_reused(config: PrepareConfig) -> None:
    first = run(config)
    before = {p.name: p.stat().st_mtime_ns for p in Path(config.paths.data_dir).iterdir()}
    assert run(dataclasses.replace(config, num_processes=2)) == first
    assert run(dataclasses.replace(config, overwrite=True)) == first
    after = {p.name: p.stat().st_mtime_ns for p in Path(config.paths.data_dir).iterdir()}
    assert after == before


def test_another_configuration_is_refused_with_the_difference(config: PrepareConfig) -> None:
    run(config)
    before = content(config)
    other = dataclasses.replace(with_data(config, validation_fraction=0.3), seed=5)
    with pytest.raises(
        DataError, match=r"data\.validation_fraction is 0\.2 there, 0\.3 here"
    ) as caught:
        run(other)
    assert "seed is 0 there, 5 here" in str(caught.value)
    assert "overwrite=true" in str(caught.value)
    assert content(config) == before
    run(dataclasses.replace(other, overwrite=True))
    assert content(config) != before
    assert left_over(config) == []


def test_changed_text_is_noticed(config: PrepareConfig, tmp_path: Path, texts: Path) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    for path in texts.glob("*/*.txt"):
        (source / path.name).write_text(path.read_text())
    own = with_data(config, sources=(str(source),))
    run(own)
    (source / "05.txt").write_text("changed")
    with pytest.raises(DataError, match=r"the files of data\.sources have changed"):
        run(own)


def test_a_damaged_folder_is_not_reused_but_can_be_replaced(config: PrepareConfig) -> None:
    first = run(config)
    path = Path(config.paths.data_dir) / "train-00000.tokens"
    good = path.read_bytes()
    path.write_bytes(good[:100] + bytes([good[100] ^ 4]) + good[101:])
    with pytest.raises(DataError, match=r"train-00000\.tokens.*overwrite=true"):
        run(config)
    assert run(dataclasses.replace(config, overwrite=True)) == first
    assert path.read_bytes() == good


def test_a_folder_with_other_things_is_never_replaced(config: PrepareConfig) -> None:
    target = Path(config.paths.data_dir)
    target.mkdir(parents=True)
    run(config)  # an empty folder is fine
    (target / "train_notes.txt").write_text("mine")
    other = dataclasses.replace(config, seed=1, overwrite=True)
    with pytest.raises(DataError, match=r"'train_notes\.txt', which overwrite=true would delete"):
        run(other)
    (target / "manifest.json").unlink()
    with pytest.raises(DataError, match="not made by prepare_data"):
        run(other)
    assert (target / "train_notes.txt").read_text() == "mine"


def test_an_empty_corpus_says_what_to_do(config: PrepareConfig, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"no document.*1 not a known text suffix \(empty/a\.png"):
        run(with_data(config, sources=(str(empty),)))
    (empty / "a.txt").write_text("one document alone")
    with pytest.raises(DataError, match="ids for this text"):
        run(with_data(config, sources=(str(empty),)))
    assert left_over(config) == []
    assert not Path(config.paths.data_dir).exists()


def test_a_target_that_cannot_be_written_is_named(config: PrepareConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/inner"):
        bad = dataclasses.replace(config, paths=PathsConfig(data_dir=str(tmp_path / place)))
        with pytest.raises(DataError, match=r"paths\.data_dir: .*file"):
            run(bad)
    assert (tmp_path / "file").read_text() == "mine"


LIMITED = """
import resource, signal, sys
from moe.config import *
from moe.data.prepare import prepare
from moe.errors import DataError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
config = PrepareConfig(
    data=DataConfig(sources=(sys.argv[1],), validation_fraction=0.2), num_processes=1, seed=9,
    tokenizer=TokenizerConfig(vocab_size=512), paths=PathsConfig(data_dir=sys.argv[2]),
    overwrite=True,
)
try:
    prepare(config, on_progress=lambda what, done, total: None)
except DataError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [5000, 12_000])  # bytes: the text, then the shard
def test_a_full_disk_is_one_message_and_keeps_the_old_folder(
    config: PrepareConfig, texts: Path, limit: int
) -> None:
    run(config)
    before = content(config)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(texts), config.paths.data_dir, str(limit)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "")
    assert "cannot be written" in done.stdout
    assert config.paths.data_dir in done.stdout
    assert content(config) == before
    assert left_over(config) == []


# killed when the file argv[3] holds as many lines as argv[4]: one for each call of the progress
KILLED = """
import os, signal, sys
import moe.data.corpus
from moe.config import *
from moe.data.prepare import prepare
moe.data.corpus.LEAST_PART_BYTES = 3000
calls = 0
def on_progress(what, done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        print(what, flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[4]))
prepare(PrepareConfig(
    data=DataConfig(sources=(sys.argv[1],), validation_fraction=0.2), num_processes=1, seed=9,
    tokenizer=TokenizerConfig(vocab_size=512), paths=PathsConfig(data_dir=sys.argv[2]),
    overwrite=True,
), on_progress=on_progress, shard_bytes=3000)
"""


def start_to_be_killed(config: PrepareConfig, texts: Path, call: int, name: str) -> str:
    """Prepare with seed 9 up to a call of the progress: the stage, or "" if it came to an end."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(texts), config.paths.data_dir, str(call), name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE,
        text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == (-getattr(signal, name) if done.stdout else 0)
    return done.stdout.strip()


def test_kills_keep_the_old_folder_and_the_same_command_goes_on_to_the_same_bytes(
    config: PrepareConfig, texts: Path, tmp_path: Path
) -> None:
    run(config)
    before = content(config)
    whole = dataclasses.replace(
        config, seed=9, paths=PathsConfig(data_dir=str(tmp_path / "whole" / "prepared"))
    )
    run(whole, shard_bytes=3000)
    stages, done_in_tokenising = [], []
    for call, name in ((3, "SIGKILL"), (4, "SIGTERM"), (4, "SIGKILL"), (8, "SIGKILL")):
        stages.append(start_to_be_killed(config, texts, call, name))
        assert content(config) == before
        assert left_over(config) == [".prepared.building"]
        kept = Path(config.paths.data_dir).with_name(".prepared.building")
        done_in_tokenising.append(len(list(kept.glob("tokens-*.json"))))
    assert stages[0] == "reading"
    assert done_in_tokenising == sorted(done_in_tokenising)  # what was done is not done again
    assert done_in_tokenising[-1] > 1
    assert start_to_be_killed(config, texts, 1000, "SIGKILL") == ""
    assert content(config) == content(whole)
    assert left_over(config) == []


def test_a_later_builder_removes_what_a_killed_one_left_of_other_settings(
    config: PrepareConfig, texts: Path
) -> None:
    assert start_to_be_killed(config, texts, 6, "SIGKILL") != ""
    first = run(config)
    assert left_over(config) == []
    assert (first.seed, run(config)) == (0, first)


def test_a_stop_between_the_renames_is_undone(config: PrepareConfig) -> None:
    first = run(config)
    target = Path(config.paths.data_dir)
    before = content(config)
    target.rename(target.with_name(f".{target.name}.replaced"))
    with pytest.raises(DataError, match="seed is 0 there, 7 here"):
        run(dataclasses.replace(config, seed=7))
    assert content(config) == before
    assert run(config) == first
    assert left_over(config) == []


def test_a_linked_target_is_replaced_where_it_lies(config: PrepareConfig, tmp_path: Path) -> None:
    run(config)
    (tmp_path / "link").symlink_to(config.paths.data_dir)
    linked = dataclasses.replace(config, paths=PathsConfig(data_dir=str(tmp_path / "link")))
    assert run(dataclasses.replace(linked, seed=3, overwrite=True)).seed == 3
    assert (tmp_path / "link").is_symlink()
    assert open_split(config.paths.data_dir, "train", verify=True).manifest.seed == 3
    assert left_over(config) == []


def test_a_second_builder_is_refused_and_told_who_is_first(config: PrepareConfig) -> None:
    said: list[str] = []

    def while_it_is_prepared(what: str, done: int, total: int) -> None:
        if what == "tokenising" and done == total:
            with pytest.raises(DataError) as caught:
                run(dataclasses.replace(config, seed=4))
            said.append(str(caught.value))

    manifest = prepare(config, on_progress=while_it_is_prepared)
    assert f"process {os.getpid()} on {socket.gethostname()}, since 20" in said[0]
    assert "is preparing this folder" in said[0]
    assert open_split(config.paths.data_dir, "train", verify=True).manifest == manifest
    assert left_over(config) == []


def test_progress_is_reported_to_the_end(config: PrepareConfig) -> None:
    calls: list[tuple[str, int, int]] = []
    prepare(config, on_progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(what for what, _, _ in calls))
    assert stages == ["reading", "training the tokenizer", "tokenising", "writing"]
    for stage in stages:
        done = [number for what, number, _ in calls if what == stage]
        assert done == sorted(done)
    assert calls[-1][1] == calls[-1][2] > 0


def test_a_dead_process_is_one_message(
    config: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.data.corpus.LEAST_PART_BYTES", 3000)
    monkeypatch.setattr("moe.data.prepare.tokenise_part", time_bomb)
    with pytest.raises(DataError, match="num_processes=2: a process that prepares text ended"):
        run(dataclasses.replace(config, num_processes=2))
    assert left_over(config) == []


def time_bomb(*arguments: object) -> None:
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


WITH_WORKERS = """
import sys, time, multiprocessing
import moe.data.corpus
from moe.config import *
from moe.data.prepare import prepare
if __name__ == "__main__":
    moe.data.corpus.LEAST_PART_BYTES = 3000
    def on_progress(what, done, total):
        if what == "reading" and done:
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
            time.sleep(60)
    prepare(PrepareConfig(
        data=DataConfig(sources=(sys.argv[1],)), num_processes=2,
        tokenizer=TokenizerConfig(vocab_size=512), paths=PathsConfig(data_dir=sys.argv[2]),
    ), on_progress=on_progress)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_no_process_outlives_the_one_that_prepares(
    config: PrepareConfig, texts: Path, tmp_path: Path, name: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(WITH_WORKERS)
    child = subprocess.Popen(
        [sys.executable, str(script), str(texts), config.paths.data_dir],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stdout is not None
    with child.stdout:
        workers = [int(pid) for pid in child.stdout.readline().split()]
        child.send_signal(getattr(signal, name))
        child.wait(timeout=60)
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "a worker is still there"
        time.sleep(0.05)


def words(generator: random.Random, number: int) -> str:
    return " ".join("".join(generator.choices("abcdefgh", k=5)) for _ in range(number))


@pytest.mark.parametrize("name", ["input.txt", "input.jsonl", "input.txt.gz"])
def test_one_text_alone_is_trained_on_and_its_end_is_held_out(
    config: PrepareConfig, tmp_path: Path, name: str
) -> None:
    generator = random.Random(2)
    text = "".join(words(generator, 9) + "\n" for _ in range(200))
    raw = text.encode() if "txt" in name else json.dumps({"text": text}).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    manifest = run(with_data(config, sources=(str(path),)))
    tokenizer = Tokenizer.load(Path(config.paths.data_dir) / "tokenizer.model", vocab_size=512)
    found = []
    for split in ("train", "validation"):
        tokens = open_split(config.paths.data_dir, split, verify=True)
        assert tokens.num_documents == 1
        found.append(tokenizer.decode(tokens.tokens(0)[1:-1].tolist()))
    assert found[0] + found[1] == text
    assert found[0].endswith("\n")
    assert 0.15 < len(found[1]) / len(text) < 0.25
    assert manifest.domains == ("input",)


def test_a_long_text_alone_is_cut_in_pieces_and_each_gives_its_end(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.data.text_pieces.PIECE_BYTES", 4000)
    monkeypatch.setattr("moe.data.corpus.PIECE_BYTES", 4000)
    generator = random.Random(3)
    path = tmp_path / "book.txt"
    path.write_text("".join(words(generator, 9) + "\n" for _ in range(400)))
    manifest = run(with_data(config, sources=(str(path),)))
    pieces = -(-path.stat().st_size // 4000)
    assert [split.num_documents for split in manifest.splits] == [pieces, pieces]
    assert sum(split.num_bytes for split in manifest.splits) == path.stat().st_size


def test_a_text_too_short_to_hold_an_end_out_is_refused(
    config: PrepareConfig, tmp_path: Path
) -> None:
    model = tmp_path / "kept.model"
    run(config)
    model.write_bytes((Path(config.paths.data_dir) / "tokenizer.model").read_bytes())
    path = tmp_path / "one.txt"
    path.write_text("x")
    small = dataclasses.replace(
        with_data(config, sources=(str(path),)),
        tokenizer=TokenizerConfig(vocab_size=512, model_path=str(model)),
        paths=PathsConfig(data_dir=str(tmp_path / "second")),
    )
    with pytest.raises(DataError, match=r"nothing is left for validation: .*too short.*Add text"):
        run(small)
    assert not (tmp_path / ".second.building").exists()


def test_bad_lines_are_left_out_up_to_the_number_allowed_and_named(
    config: PrepareConfig, tmp_path: Path
) -> None:
    generator = random.Random(4)
    lines = [json.dumps({"body": words(generator, 60)}) for _ in range(40)]
    lines[11] = "{oops"
    lines[23] = '{"body": null}'
    path = tmp_path / "feed.jsonl"
    path.write_text("\n".join(lines))
    own = with_data(config, sources=(str(path),), text_key="body")
    for allowed in (0, 1):
        with pytest.raises(DataError, match=r"feed\.jsonl, line \d+: .*data\.max_bad_lines=N"):
            run(with_data(own, max_bad_lines=allowed))
    with pytest.raises(DataError, match=r"set data\.text_key=body\.$"):  # no word of a tolerance
        run(with_data(own, text_key="text"))
    manifest = run(with_data(own, max_bad_lines=2))
    assert sum(split.num_documents for split in manifest.splits) == 38
    (skip,) = manifest.skipped
    assert (skip.count, skip.reason) == (2, "a record that cannot be read")
    assert skip.examples == (f"{path}, line 12", f"{path}, line 24")
    assert '"data.text_key": "body"' in manifest.settings


def test_the_first_files_left_out_are_named_in_the_manifest(
    config: PrepareConfig, texts: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    for path in texts.glob("*/*.txt"):
        (source / path.name).write_text(path.read_text())
    for number in range(9):
        (source / f"picture{number}.txt").write_bytes(b"\0")
    manifest = run(with_data(config, sources=(str(source),)))
    found = {skip.reason: skip for skip in manifest.skipped}
    assert found["binary"].count == 9
    assert found["binary"].examples == tuple(f"mine/picture{number}.txt" for number in range(5))


def test_text_changed_while_it_is_prepared_is_noticed(
    config: PrepareConfig, texts: Path, tmp_path: Path
) -> None:
    source = tmp_path / "mine"
    source.mkdir()
    for path in texts.glob("*/*.txt"):
        (source / path.name).write_text(path.read_text())

    def change(stage: str, content: str) -> None:
        def on_progress(what: str, done: int, total: int) -> None:
            if what == stage and done == 0:
                (source / "05.txt").write_text(content)

        with pytest.raises(DataError, match=r"data\.sources: .*changed.* while .* prepared"):
            prepare(own, on_progress=on_progress)
        assert not Path(config.paths.data_dir).exists()

    own = with_data(config, sources=(str(source),))
    change("tokenising", "another text")
    change("writing", "and another one")
    assert run(own)


def test_work_on_a_large_text_is_kept_after_an_error(
    config: PrepareConfig, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.data.prepare.KEEP_FROM_BYTES", 1000)

    def fail(what: str, done: int, total: int) -> None:
        if what == "writing":
            raise DataError("no luck.")

    with pytest.raises(
        DataError, match=r"no luck\. What is done is kept in .*\.prepared\.building"
    ):
        prepare(config, on_progress=fail)
    assert left_over(config) == [".prepared.building"]
    run(config)
    assert left_over(config) == []
