"""moe/data/corpus.py: order, domains and groups, and errors that name file and line."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from moe.data.corpus import Document, read_documents, sources_signature
from moe.errors import DataError


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
        (b"[1, 2]", 'no "text"'),
        (b'{"txt": "x"}', r"found \['txt'\]"),
        (b'{"text": 3}', 'no "text"'),
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
