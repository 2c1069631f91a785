"""What every tokenizer here takes for text, and for white space in it."""

from __future__ import annotations

from moe.errors import DataError

# Unicode's White_Space, which is \s for tiktoken and transformers; Python's \s and str.lstrip()
# also take U+001C to U+001F
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + (
    "\u2028\u2029\u202f\u205f\u3000"
)  # fmt: skip


def require_text(text: str) -> None:
    """Raise DataError for half a surrogate pair, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text: character {error.start} is half of a surrogate pair, which is not text. "
            "Remove it, or decode its source as UTF-8."
        ) from None
