"""A conversation as a prompt: the newest turns that fit into what the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe.data.load_tokenizer import TextTokenizer
from moe.errors import UserError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


@dataclass(frozen=True)
class ChatPrompt:
    """Token ids of the template, the messages in them, and how many old turns were left out."""

    ids: list[int]
    messages: list[Message]
    num_dropped: int  # turns: a user's message with its answer


def chat_prompt(
    messages: Sequence[Message],
    tokenizer: TextTokenizer,
    *,
    template: str,
    usable_length: int,
    max_new_tokens: int,
    name: str = "prompt",
) -> ChatPrompt:
    """Put messages into the template, oldest turns left out; the last is the user's, or the
    beginning of an answer to it, which is left open.

    A system message at the front always stays. Raises UserError where not even the last message
    leaves room for max_new_tokens, DataError for what is no message.
    """
    room = usable_length - max_new_tokens
    num_system = int(messages[0].get("role") == "system")
    system, turns = list(messages[:num_system]), list(messages[num_system:])
    num_dropped = 0
    goes_on = messages[-1]["role"] == "assistant"
    ids = tokenizer.chat_ids([*system, *turns], template=template, continues_answer=goes_on)
    while len(ids) > room and (rest := _after_first_turn(turns)):
        turns = rest
        num_dropped += 1
        ids = tokenizer.chat_ids([*system, *turns], template=template, continues_answer=goes_on)
    if len(ids) > room:
        raise UserError(
            f"{name}: the message makes {len(ids)} tokens and sampling.max_new_tokens="
            f"{max_new_tokens} are kept for the answer; the model takes {usable_length} in all. "
            "Shorten the message or lower sampling.max_new_tokens."
        )
    return ChatPrompt(ids, [*system, *turns], num_dropped)


def _after_first_turn(turns: Sequence[Message]) -> list[Message]:
    """The messages from the second of the user's on."""
    users = [place for place, message in enumerate(turns) if message["role"] == "user"]
    return list(turns[users[1] :]) if len(users) > 1 else []
