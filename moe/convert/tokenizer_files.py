"""A tokenizer as the files of a Hugging Face folder, which transformers opens without our code.

AutoTokenizer.from_pretrained(folder) gives our ids for any text without written special tokens,
after the first token where the model is used to it, and with them what encode(text,
allow_special=True) gives; apply_chat_template gives our chat_ids for contents without them.
transformers also takes a written <unk>, <s> or </s> for the token.
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
    tokenizer: TextTokenizer, *, chat_template: str, max_length: int, adds_bos: bool
) -> dict[str, bytes]:
    """Content of each file by name; max_length is the tokens that the model takes.

    adds_bos: whether the model is used to its first token at the front of a plain text, so that
    every reader of these files puts it there (a chat template writes its own).

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
    if adds_bos:
        whole["post_processor"] = _bos_before_text(special["bos_token"], tokenizer.bos_id)
    config = {
        **special,
        "add_bos_token": adds_bos,
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
    files = {
        "tokenizer.json": _json(whole),
        "tokenizer_config.json": _json(config),
        "special_tokens_map.json": _json(special),
        "added_tokens.json": _json(tokenizer.special_ids),
    }
    if isinstance(tokenizer, Tokenizer) and tokenizer.is_json:
        return files
    return files | {"tokenizer.model": tokenizer.model_bytes()}


def _bos_before_text(token: str, number: int) -> dict[str, Any]:
    """tokenizer.json's template for a text, and for a pair of texts."""

    def text(name: str, type_id: int) -> list[dict[str, Any]]:
        bos = {"SpecialToken": {"id": token, "type_id": type_id}}
        return [bos, {"Sequence": {"id": name, "type_id": type_id}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, indent=1).encode() + b"\n"
