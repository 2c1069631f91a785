"""A tokenizer as the files of a Hugging Face folder, which transformers opens without our code.

AutoTokenizer.from_pretrained(folder) gives our ids for any text without written special tokens,
and with them what encode(text, allow_special=True) gives; apply_chat_template gives our chat_ids
for contents without them. transformers also takes a written <unk>, <s> or </s> for the token.
"""

from __future__ import annotations

import json
from typing import Any

from moe.convert.chat_template_text import template_text
from moe.convert.tokenizer_json import sentencepiece_json, tiktoken_json
from moe.data.load_tokenizer import TextTokenizer
from moe.data.tiktoken_tokenizer import TiktokenTokenizer
from moe.data.tokenizer import BOS, UNKNOWN, Tokenizer

_END_OF_TEXT = "<|endoftext|>"


def hugging_face_tokenizer_files(
    tokenizer: TextTokenizer, *, chat_template: str, max_length: int
) -> dict[str, bytes]:
    """Content of each file by name; max_length is the tokens that the model takes.

    Raises DataError for a SentencePiece file whose pieces tokenizer.json cannot express.
    """
    if isinstance(tokenizer, TiktokenTokenizer):
        whole, special = tiktoken_json(tokenizer), {"bos_token": _END_OF_TEXT}
    elif isinstance(tokenizer, Tokenizer):
        whole = sentencepiece_json(tokenizer)
        special = {"bos_token": BOS, "unk_token": UNKNOWN}
    else:
        raise TypeError(f"{type(tokenizer).__name__} is neither kind of tokenizer")
    special |= {"eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT}
    config = {
        **special,
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in whole["added_tokens"]
        },
        "chat_template": template_text(chat_template, bos_token=special["bos_token"]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "tokenizer.json": _json(whole),
        "tokenizer.model": tokenizer.model_bytes(),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
        "added_tokens.json": _json(tokenizer.special_ids),
    }


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"
