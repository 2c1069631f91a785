"""The text of every token id, kept with a trace so that tokens can be shown without a tokenizer."""

from __future__ import annotations

import json

from moe.data.load_tokenizer import TextTokenizer


def vocabulary_bytes(tokenizer: TextTokenizer) -> bytes:
    """A JSON list: entry n is the text of id n, "" where it has none.

    Special tokens by name; bytes that are not a whole character become U+FFFD.
    """
    texts = [
        "".join(tokenizer.decode_stream([number], keep_special=True))
        for number in range(tokenizer.vocab_size)
    ]
    return json.dumps(texts, ensure_ascii=False, indent=0).encode() + b"\n"
