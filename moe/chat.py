"""A conversation as a prompt: the newest turns that fit into what the model takes."""

from __future__ import annotations

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
    messages: list[Message], tokenizer: TextTokenizer, *, usable_length: int, max_new_tokens: int
) -> ChatPrompt:
    """Put messages, which end with the user's, into the Phi-3.5 template, oldest turns left out.

    A system message at the front always stays. Raises UserError where not even the last message
    leaves room for max_new_tokens.
    """
    room = usable_length - max_new_tokens
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    num_dropped = 0
    ids = tokenizer.chat_ids(system + turns)
    while len(ids) > room and len(turns) > 2:
        turns = turns[2:]
        num_dropped += 1
        ids = tokenizer.chat_ids(system + turns)
    if len(ids) > room:
        raise UserError(
            f"prompt: the message makes {len(ids)} tokens and sampling.max_new_tokens="
            f"{max_new_tokens} are kept for the answer; the model takes {usable_length} in all. "
            "Shorten the message or lower sampling.max_new_tokens."
        )
    return ChatPrompt(ids, system + turns, num_dropped)
