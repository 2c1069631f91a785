"""Files of prompts: every accepted form, and each mistake with its file and line."""

from __future__ import annotations

import json

import pytest

from moe.errors import UserError
from moe.prompts_file import Prompt, as_conversation, read_prompts_file

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


def given(path, *, chat: bool = False, system: str = "") -> list:
    return [prompt.given for prompt in read_prompts_file(str(path), chat=chat, system=system)]


def test_a_text_file_has_one_prompt_a_line_exactly_as_written(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(
        b'\xef\xbb\xbf  def f(x): \n\n{"prompt": "x"}\r\nli\xe2\x80\xa8ne \x0c 2\n \t\n\xc3\xbc'
    )
    assert given(path) == ["  def f(x): ", '{"prompt": "x"}', "li\u2028ne \x0c 2", "\u00fc"]
    places = [prompt.where for prompt in read_prompts_file(str(path), chat=False, system="")]
    assert places == [f"{path}, line {number}" for number in (1, 3, 4, 6)]


def test_json_lines_hold_texts_conversations_and_token_ids(tmp_path):
    path = tmp_path / "prompts.jsonl"
    conversation = [SYSTEM, USER, {"role": "assistant", "content": "Yes?"}, USER]
    records = [{"prompt": "a\nb"}, {"messages": conversation, "id": 7}, {"prompt_ids": [3, 4]}]
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    assert given(path) == ["a\nb", conversation, (3, 4)]
    first, second, third = read_prompts_file(str(path), chat=False, system="")
    assert [first.record, third.record] == [{"prompt": "a\nb"}, {"prompt_ids": (3, 4)}]
    assert second.record == {"messages": conversation}


@pytest.mark.parametrize("ending", ["json", "csv", "tsv", "parquet"])
def test_a_file_whose_lines_are_no_prompts_is_refused(ending, tmp_path):
    path = tmp_path / f"prompts.{ending}"
    path.write_text('[\n{"prompt": "x"}\n]\n')
    with pytest.raises(UserError, match=r"allowed: JSON lines \(\.jsonl, \.ndjson\)"):
        given(path)
    (tmp_path / "prompts.ndjson").write_text('{"prompt": "x"}\n')
    assert given(tmp_path / "prompts.ndjson") == ["x"]


def test_with_chat_a_text_is_a_user_s_message_and_system_opens_what_has_none(tmp_path):
    path = tmp_path / "prompts.jsonl"
    own = {"role": "system", "content": "Mine."}
    records = [{"prompt": "Hi"}, {"messages": [USER]}, {"messages": [own, USER]}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert given(path, chat=True) == [[USER], [USER], [own, USER]]
    assert given(path, chat=True, system="Be brief.") == [
        [SYSTEM, USER],
        [SYSTEM, USER],
        [own, USER],
    ]
    assert given(path, system="Be brief.") == ["Hi", [SYSTEM, USER], [own, USER]]


def test_a_content_in_parts_is_its_texts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    record = {"messages": [{"role": "user", "content": parts[:1]},
                           {"role": "assistant", "content": []},
                           {"role": "user", "content": parts}]}  # fmt: skip
    path.write_text(json.dumps(record))
    assert [message["content"] for message in given(path)[0]] == ["a", "", "a\nb"]


def test_an_answer_that_is_begun_is_shown_and_gone_on_from(tmp_path):
    path = tmp_path / "prompts.jsonl"
    begun = [USER, {"role": "assistant", "content": "Yes, "}]
    records = [{"messages": begun}, {"messages": [USER]}, {"prompt": "x"}, {"prompt_ids": [1]}]
    path.write_text("\n".join(map(json.dumps, records)))
    prompts = read_prompts_file(str(path), chat=False, system="Be brief.")
    assert prompts[0].given == [SYSTEM, *begun]
    assert [prompt.start for prompt in prompts] == ["Yes, ", "", "x", ""]
    assert [prompt.starts_text for prompt in prompts] == [False, True, False, False]


MISTAKES = {
    "not_json": (b'{"prompt": "a"}\n{"prompt": \n', ["line 2", "is not JSON", "one object a line"]),
    "deep": (b"[" * 100_000, ["line 1", "is not JSON"]),
    "not_utf8": (b'{"prompt": "\xff"}', ["line 1", "byte 13", "UTF-8"]),
    "no_object": (b'"a text"', ["line 1", '"a text"', "prompt, messages, prompt_ids"]),
    "no_key": (b'{"text": "a"}', ["line 1", '{"text": "a"}', "just one of"]),
    "two_keys": (b'{"prompt": "a", "prompt_ids": [1]}', ["line 1", "just one of"]),
    "no_text": (b'{"prompt": 3}', ["line 1", "prompt must be text", "got 3"]),
    "no_ids": (b'{"prompt_ids": [1, true]}', ["line 1", "list of token ids", "[1, true]"]),
    "no_messages": (b'{"messages": []}', ["line 1", "messages must be a list of", "got []"]),
    "no_message": (b'{"messages": ["a"]}', ["line 1", '"role"', 'message 1', 'got "a"']),
    "other_role": (
        b'{"messages": [{"role": "tool", "content": "a"}]}', ["system | user | assistant", "tool"],
    ),
    "no_content": (b'{"messages": [{"role": "user", "content": null}]}', ['"content": text']),
    "answer_to_nothing": (
        b'{"messages": [{"role": "assistant", "content": "a"}]}', ["end with the user's"],
    ),
    "answer_twice": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, '
        b'{"role": "assistant", "content": "c"}]}', ["end with the user's, or with the beginning"],
    ),
    "developer": (
        b'{"messages": [{"role": "developer", "content": "a"}]}',
        ["line 1, message 1", "no other role", "write it as a system message", '"developer"'],
    ),
    "tool": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "4"}]}',
        ["line 1, message 2", "write the result into the user's message"],
    ),
    "picture": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        ["line 1, message 1", "texts alone", "image_url"],
    ),
    "other_format": (
        b'{"conversations": [{"from": "human", "value": "hi"}]}',
        ["line 1", '"conversations"; write "messages"', '"content" for "value"'],
    ),
    "system_later": (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, '
        b'{"role": "user", "content": "c"}]}', ["can only be the first"],
    ),
    "nothing": (b"\n \n", ["holds no prompt"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_file_and_line(name, tmp_path):
    content, words = MISTAKES[name]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_prompts_file(str(path), chat=False, system="")
    for word in [str(path), *words]:
        assert word in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_what_is_no_file_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"prompts_file: .* cannot be read .*one prompt a line"):
        read_prompts_file(name, chat=False, system="")


def test_token_ids_are_no_conversation():
    with pytest.raises(UserError, match="here: prompt_ids with chat=true"):
        as_conversation(Prompt("here", (1, 2)), system="")
