"""moe/data/corpus.py: order, domains and groups, and errors that name file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from moe.data.corpus import Document, documents_of, parts_of, read_documents
from moe.data.source_files import LINK_OUTSIDE, LINKED_FOLDER, source_files, sources_signature
from moe.errors import DataError

PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
}


def read(*sources: Path | str) -> tuple[list[Document], Counter[str]]:
    skipped: Counter[str] = Counter()
    found = list(
        read_documents([str(s) for s in sources], on_skip=lambda _, why: skipped.update([why]))
    )
    return found, skipped


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_folder_is_read_in_order_with_its_domains(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write(root / "z.txt", "last")
    write(root / "law" / "b.md", "two")
    write(root / "law" / "a" / "c.txt", "one")
    write(root / "README", "read me")
    documents, skipped = read(root)
    assert [(d.origin, d.domain, d.text) for d in documents] == [
        ("mine/README", "mine", "read me"),
        ("mine/law/a/c.txt", "law", "one"),
        ("mine/law/b.md", "law", "two"),
        ("mine/z.txt", "mine", "last"),
    ]
    assert len({d.group for d in documents}) == 4
    assert not skipped


def test_what_is_not_text_is_counted_and_left_out(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write(root / "binary.txt", b"a\0b")
    write(root / "latin.txt", b"caf\xe9")
    write(root / "empty.txt", b"  \n")
    write(root / "picture.png", b"\x89PNG")
    write(root / ".hidden" / "a.txt", "no")
    write(root / "node_modules" / "a.js", "no")
    write(root / "good.txt", "yes")
    os.symlink(root, root / "loop")
    (root / "dangling.txt").symlink_to("nowhere")
    documents, skipped = read(root)
    assert [d.text for d in documents] == ["yes"]
    assert skipped == {
        "binary": 1, "not UTF-8": 1, "empty": 1, "not a known text suffix": 1, "not a file": 1,
        LINKED_FOLDER: 1,
    }  # fmt: skip


def test_line_ends_stay_as_they_are_and_a_byte_order_mark_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.txt", b"\xef\xbb\xbfa\r\nb\n")
    documents, _ = read(path)
    assert [(d.text, d.domain) for d in documents] == [("a\r\nb\n", "notes")]


def test_origins_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    for place in ("here", "there/deep"):
        write(tmp_path / place / "mine" / "a.txt", "text")
    assert read(tmp_path / "here/mine")[0] == read(tmp_path / "there/deep/mine")[0]


def test_jsonl_lines_are_documents(tmp_path: Path) -> None:
    lines = [
        {"text": "a\u2028b", "domain": "news", "id": 7},
        {"text": "c", "id": 7},
        {"text": "d", "domain": None, "other": [1]},
        {"text": "  "},
    ]
    path = write(
        tmp_path / "feed.jsonl",
        "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n",
    )
    documents, skipped = read(path)
    assert [(d.text, d.domain) for d in documents] == [
        ("a\u2028b", "news"), ("c", "feed"), ("d", "feed"),
    ]  # fmt: skip
    assert len({d.group for d in documents}) == 3
    assert skipped == {"empty": 1}


def test_a_line_without_id_keeps_its_group_when_lines_are_added(tmp_path: Path) -> None:
    path = write(tmp_path / "feed.jsonl", '{"text": "same"}\n')
    before = read(path)[0][0].group
    write(path, '{"text": "new"}\n{"text": "same"}\n')
    assert read(path)[0][1].group == before


def test_jsonl_files_in_a_folder_are_read_too(tmp_path: Path) -> None:
    write(tmp_path / "mine" / "law" / "a.jsonl", '{"text": "one"}\n')
    assert [(d.text, d.domain) for d in read(tmp_path / "mine")[0]] == [("one", "law")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops", "not JSON"),
        (b"[1, 2]", 'is a list; it has no "text"'),
        (b'{"txt": "x"}', r"no \"text\" \(found 'txt'\)"),
        (b'{"text": 3}', r'"text" is a number \(3\)'),
        (b'{"text": null}', '"text" is null'),
        (b'{"text": ["a", "b"]}', '"text" is a list'),
        (b'{"text": {"a": 1}}', '"text" is an object'),
        (b'{"text": true}', '"text" is true or false'),
        (b'{"content": "x"}', r"set data\.text_key=content"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "conversation.*plain text: write"),
        (b'{"prompt": "hi", "completion": "ho"}', "question and its answer.*write both"),
        (b'{"instruction": "a", "input": "", "output": "b"}', '"instruction" and "output" are'),
        (b'{"text": "x", "domain": 3}', '"domain" is 3'),
        (b'{"text": "x", "domain": ""}', '"domain" is'),
        (b'{"text": "x", "id": [1]}', '"id" is'),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"text": "x", "n": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_a_bad_jsonl_line_names_file_and_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "feed.jsonl", b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"feed\.jsonl, line 3: .*{reason}"):
        read(path)


def test_a_missing_source_is_named_with_the_nearest_right_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.sources: '.*absent' does not exist"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"Did you mean 'builtin:python'"):
        read("builtin:pyton")


def test_the_signature_changes_with_the_files(tmp_path: Path) -> None:
    path = write(tmp_path / "mine" / "a.txt", "one")
    source = [str(tmp_path / "mine")]
    first = sources_signature(source)
    assert sources_signature(source) == first
    write(path, "three")
    second = sources_signature(source)
    assert second != first
    write(tmp_path / "mine" / "b.txt", "two")
    assert sources_signature(source) not in (first, second)


def test_linked_folders_are_named_and_links_out_of_the_source_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write(root / "real" / "a.txt", "good")
    write(tmp_path / "other" / "b.txt", "of another folder")
    write(tmp_path / "credentials", "secret_key=1")
    (root / "big_domain").symlink_to(tmp_path / "other")
    (root / "notes.txt").symlink_to(tmp_path / "credentials")
    (root / "relative.md").symlink_to("../credentials")
    (root / "chain.txt").symlink_to("notes.txt")
    (root / "inside.txt").symlink_to("real/a.txt")
    named: list[tuple[str, str]] = []
    documents = list(
        read_documents([str(root)], on_skip=lambda origin, why: named.append((origin, why)))
    )
    assert [(d.origin, d.text) for d in documents] == [
        ("mine/inside.txt", "good"), ("mine/real/a.txt", "good"),
    ]  # fmt: skip
    assert sorted(named) == [
        ("mine/big_domain", LINKED_FOLDER), ("mine/chain.txt", LINK_OUTSIDE),
        ("mine/notes.txt", LINK_OUTSIDE), ("mine/relative.md", LINK_OUTSIDE),
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(root)  # a source may be a link itself
    assert len(read(tmp_path / "link")[0]) == 2


RECORDS = [{"text": f"text {number}", "domain": "news", "id": number // 2} for number in range(9)]
EXPECTED = [(f"text {number}", "news") for number in range(9)]


@pytest.mark.parametrize("suffix", ["", *PACKERS])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "lines.json", "a.csv", "a.tsv"])
def test_records_are_read_from_every_kind_of_file(tmp_path: Path, name: str, suffix: str) -> None:
    if name == "a.json":
        content = json.dumps(RECORDS, indent=1)
    elif name.endswith("sv"):
        mark = "\t" if name == "a.tsv" else ","
        content = mark.join(("id", "domain", "other", "text")) + "\r\n"
        content += "".join(
            mark.join((str(r["id"]), "news", '"a\nb"', f'"{r["text"]}"')) + "\r\n" for r in RECORDS
        )
    else:
        content = "\n".join(map(json.dumps, RECORDS)) + "\n"
    raw = content.encode()
    path = write(tmp_path / "mine" / (name + suffix), PACKERS[suffix](raw) if suffix else raw)
    for source in (path, path.parent):
        documents, skipped = read(source)
        assert [(d.text, d.domain) for d in documents] == EXPECTED
        assert len({d.group for d in documents}) == 5
        assert not skipped


def test_parquet_is_read_by_its_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{**record, "n": [1]} for record in RECORDS])
    parquet.write_table(table, path, row_group_size=4)
    assert [(d.text, d.domain) for d in read(path)[0]] == EXPECTED
    table = pyarrow.Table.from_pylist([{"content": "x"}, {"content": "y"}])
    parquet.write_table(table, path)
    with pytest.raises(DataError, match=r"no column 'text' .*set data\.text_key=content"):
        read(path)
    found = read_documents([str(path)], on_skip=lambda *_: None, text_key="content")
    assert [d.text for d in found] == ["x", "y"]
    write(path, b"PAR1" + b"x" * 40)
    with pytest.raises(DataError, match=r"a\.parquet: is not a Parquet file, or it is damaged"):
        read(path)


def test_a_packed_text_is_one_document_under_its_own_name(tmp_path: Path) -> None:
    for suffix, pack in PACKERS.items():
        path = write(tmp_path / f"notes.txt{suffix}", pack(b"some text\n"))
        assert [(d.text, d.domain) for d in read(path)[0]] == [("some text\n", "notes")]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_that_was_cut_short_or_is_no_such_file_is_named(
    tmp_path: Path, suffix: str
) -> None:
    generator = random.Random(0)
    raw = "".join(json.dumps({"text": str(generator.random())}) + "\n" for _ in range(2000))
    packed = PACKERS[suffix](raw.encode())
    for content in (packed[: len(packed) // 2], packed[:4] + b"x" * 40):
        path = write(tmp_path / f"a.jsonl{suffix}", content)
        with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: is damaged or was cut short"):
            read(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '{"text": "x",\n "n": 1}', "neither an array of records nor one record a line"),
        ("a.json", '{"name": "package"}', r"no \"text\" \(found 'name'\)"),
        ("a.json", '[{"content": "x"}]', r"record 1: .*set data\.text_key=content"),
        ("a.json", '[{"text": "x"}, {"text": "y"}', "cut short"),
        ("a.json", '[{"text": "x"} {"text": "y"}]', r"record 1: is followed by '\{'"),
        ("a.json", '[{"text": "x"}, {"text": 7}]', r"record 2: \"text\" is a number \(7\)"),
        ("a.json", '[{"text": "x"}, oops]', "record 2: is not JSON"),
        ("a.csv", "title,body\na,b\n", r"no column 'text'.*set data\.text_key=body"),
        ("a.csv", "title;text\na;b\n", r"separated by ';'; a \.csv file's are by ','"),
        ("a.tsv", "title,text\na,b\n", r"separated by ','; a \.tsv file's are by '\\t'"),
        ("a.csv", 'text\n"a', "not a table that can be read"),
        ("a.csv", b"text\ncaf\xe9\n", "not UTF-8"),
        ("a.arrow", "ARROW1", "a table that is not read here; write it as Parquet or JSON lines"),
        ("a.zip", "PK", "an archive; unpack it"),
        ("a.tar.gz", "x", "an archive; unpack it"),
        ("a.epub", "PK", "a formatted document; save it as plain text"),
        ("a.pkl", "x", "never opened"),
        ("records", '{"text": "x"}\n{"text": "y"}\n', r"name it \.jsonl"),
        ("a.txt", '{"text": "x"}\n{"text": "y"}\n', r"name it \.jsonl"),
    ],
)
def test_a_named_file_that_cannot_be_read_says_what_to_do(
    tmp_path: Path, name: str, content: str | bytes, reason: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=rf"{path.name}.*{reason}"):
        read(path)


def test_a_folder_leaves_out_tables_without_text_and_what_is_no_text(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    write(root / "good.txt", "yes")
    write(root / "package.json", '{"name": "x"}')
    write(root / "list.json", "[1, 2]")
    write(root / "pretty.json", '{\n "name": "x"\n}')
    write(root / "numbers.csv", "a,b\n1,2\n")
    write(root / "model.pkl", b"x")
    write(root / "utf16.txt", "Zeile eins\n".encode("utf-16"))
    write(root / "utf16_unmarked.txt", ("Zeile eins\n" * 5).encode("utf-16-le"))
    documents, skipped = read(root)
    assert [d.text for d in documents] == ["yes"]
    assert skipped == {
        "without texts: no 'text' in its records": 4,
        "a file of Python or NumPy objects, which is not read": 1,
        "UTF-16: save it as UTF-8": 2,
    }


def test_a_named_file_of_any_other_name_is_text(tmp_path: Path) -> None:
    path = write(tmp_path / "server.log", "line\n" * 3)
    assert [d.text for d in read(path)[0]] == ["line\n" * 3]


def test_parts_have_the_documents_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.data.corpus.LEAST_PART_BYTES", 700)
    monkeypatch.setattr("moe.data.text_pieces.PIECE_BYTES", 500)
    monkeypatch.setattr("moe.data.corpus.PIECE_BYTES", 500)
    monkeypatch.setattr("moe.data.text_pieces.LINE_BYTES", 60)
    generator = random.Random(3)
    root = tmp_path / "mine"
    records = [
        {"text": "".join(generator.choices("ab\u00e9\n", k=generator.randint(1, 90)))}
        for _ in range(90)
    ]
    write(root / "lines.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in records))
    parquet.write_table(pyarrow.Table.from_pylist(records), root / "rows.parquet", row_group_size=7)
    for number, letters in enumerate(("a \n", "a\u00e9\u4e2d", "a\n" + "b" * 99)):
        write(root / f"long{number}.txt", "".join(generator.choices(letters, k=6000)))
        write(root / f"short{number}.txt", "x")
    whole = [(d.text, d.group) for d in read(root)[0]]
    parts = parts_of(list(source_files([str(root)], on_skip=lambda *_: None)))
    found = []
    for part in parts:
        for document in documents_of(
            part, on_skip=lambda *_: None, on_bad=pytest.fail, text_key="text"
        ):
            found.append((document.text, document.group))
    assert len(parts) > 20
    assert found == whole
    for number in range(3):
        pieces = [text for text, group in whole if group == f"mine/long{number}.txt"]
        assert len(pieces) > 8
        assert "".join(pieces) == (root / f"long{number}.txt").read_text()


def test_a_bad_line_far_into_a_file_is_named_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe.data.corpus.LEAST_PART_BYTES", 200)
    lines = [json.dumps({"text": f"good {number}"}) for number in range(100)]
    path = write(tmp_path / "feed.jsonl", "\n".join([*lines, "{oops", *lines]))
    parts = parts_of(list(source_files([str(path)], on_skip=lambda *_: None)))
    said: list[str] = []
    for part in parts:
        list(
            documents_of(
                part, on_skip=lambda *_: None, on_bad=lambda e: said.append(str(e)), text_key="text"
            )
        )
    assert len(parts) > 10
    assert len(said) == 1
    assert said[0].startswith(f"{path}, line 101: is not JSON")
