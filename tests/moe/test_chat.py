"""A conversation that grows: what is left out, what stays, and what does not fit at all."""

from __future__ import annotations

import itertools

import pytest

from moe.chat import chat_prompt
from moe.config import CHAT_TEMPLATE_NAMES
from moe.data.load_tokenizer import load_tokenizer
from moe.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(short_documents):
    return load_tokenizer(short_documents / "tokenizer.model", vocab_size=512)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM = say("system", "be brief")
TALK = [say(role, f"{role} {n}") for n in range(6) for role in ("user", "assistant")][:-1]


def prompt_of(messages, tokenizer, *, room: int, template: str = "phi35"):
    return chat_prompt(
        messages, tokenizer, template=template, usable_length=room + 10, max_new_tokens=10
    )


@pytest.mark.parametrize("template", CHAT_TEMPLATE_NAMES)
@pytest.mark.parametrize("start", [[], [SYSTEM]], ids=["plain", "system"])
def test_as_many_of_the_newest_turns_as_fit_are_kept_and_the_system_message(
    template, start, tokenizer
):
    def length(num_dropped: int) -> int:
        kept = [*start, *TALK[2 * num_dropped :]]
        return len(tokenizer.chat_ids(kept, template=template))

    for num_dropped in range(6):
        for room in (length(num_dropped), length(num_dropped) + 1):
            made = prompt_of([*start, *TALK], tokenizer, room=room, template=template)
            assert made.num_dropped == num_dropped
            assert made.messages == [*start, *TALK[2 * num_dropped :]]
            assert made.ids == tokenizer.chat_ids(made.messages, template=template)
    with pytest.raises(UserError, match=rf"the message makes {length(5)} tokens .* takes "):
        prompt_of([*start, *TALK], tokenizer, room=length(5) - 1, template=template)


def test_a_conversation_without_strict_turns_is_cut_before_a_user_s_message(tokenizer):
    talk = [say("user", "a"), say("user", "b"), say("assistant", "c"), say("assistant", "d"),
            say("user", "e")]  # fmt: skip
    kept = []
    for room in range(len(tokenizer.chat_ids(talk)), len(tokenizer.chat_ids(talk[-1:])) - 1, -1):
        kept.append(prompt_of(talk, tokenizer, room=room).messages)
    assert [list(group) for group, _ in itertools.groupby(kept)] == [talk, talk[1:], talk[4:]]


@pytest.mark.parametrize("template", CHAT_TEMPLATE_NAMES)
def test_an_answer_that_is_begun_stays_open_and_old_turns_go_first(template, tokenizer):
    begun = [*TALK, say("assistant", "Yes, ")]
    whole = prompt_of(begun, tokenizer, room=1000, template=template)
    closed = tokenizer.chat_ids(TALK, template=template)
    assert whole.messages == begun
    assert whole.ids[: len(closed) - 1] == closed[:-1]  # the newline joins the answer's text
    assert tokenizer.decode(whole.ids).endswith("Yes, ")
    assert whole.ids[-1] != tokenizer.special_ids["<|end|>"]
    cut = prompt_of(begun, tokenizer, room=len(whole.ids) - 1, template=template)
    assert (cut.num_dropped, cut.messages) == (1, begun[2:])


def test_the_message_names_the_prompt(tokenizer):
    with pytest.raises(UserError, match=r"^prompts.jsonl, line 3: the message makes"):
        chat_prompt(
            [say("user", "word " * 50)], tokenizer, template="phi35", usable_length=20,
            max_new_tokens=5, name="prompts.jsonl, line 3",
        )  # fmt: skip
