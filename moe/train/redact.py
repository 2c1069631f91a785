"""Which values of a configuration are secrets: replace them before anything is written or sent.

A pure function of the configuration and the environment, used wherever a configuration leaves the
process: W&B, the resolved configuration in the run folder, checkpoint manifests, crash reports. It
errs towards hiding, but the vocabulary of language models (num_tokens, use_cls_token, eos_token,
tokenizer, ...) stays readable.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

REDACTED = "<redacted>"

# a shorter value of an environment variable would match ordinary words of a configuration
MIN_ENVIRONMENT_SECRET = 8

_SECRET_WORDS = frozenset(
    (
        "password", "passwords", "passwd", "passphrase", "passcode", "secret", "secrets",
        "credential", "credentials", "apikey", "apikeys", "apitoken", "accesstoken",
        "authtoken", "privatekey", "secretkey", "accesskey", "authorization", "bearer", "jwt",
    )
)  # fmt: skip
# "key" alone is not a secret (a dictionary key, the key projection of attention); these are
_WORDS_BEFORE_KEY = frozenset(
    (
        "api", "access", "account", "auth", "deploy", "encryption", "license", "private",
        "secret", "service", "signing", "ssh",
    )
)  # fmt: skip
_WORDS_BEFORE_TOKENS = frozenset(
    (
        "access", "api", "auth", "bearer", "bot", "gh", "github", "gitlab", "hf", "hub",
        "huggingface", "job", "jwt", "npm", "oauth", "personal", "pypi", "refresh",
        "security", "session", "slack", "wandb",
    )
)  # fmt: skip
# "<word> token" means a token of text, not one that opens a door
_TEXT_TOKEN_WORDS = frozenset(
    (
        "a", "additional", "assistant", "begin", "bod", "bos", "cls", "class", "decoder",
        "each", "eod", "eos", "end", "every", "extra", "fim", "first", "forced", "image",
        "last", "mask", "new", "next", "num", "one", "out", "pad", "padding", "per", "prefix",
        "register", "sep", "single", "space", "special", "start", "stop", "suffix", "system",
        "text", "unk", "unknown", "user", "vision",
    )
)  # fmt: skip
# the last word of a variable's name; PGPASSWORD and OPENAIKEY are written in one
_VARIABLE_ENDS = (
    "KEY", "KEYS", "TOKEN", "PASS", "PASSWD", "PASSWORD", "PASSPHRASE", "PWD", "PAT", "AUTH",
    "SECRET", "SECRETS", "CREDENTIALS", "DSN",
)  # fmt: skip
_NO_SECRET_VARIABLES = ("PWD", "OLDPWD", "SSH_AUTH_SOCK", "XAUTHORITY")
_TEXT_TOKEN_VALUE = re.compile(r"\s*(<[^<>]*>|\[[^\[\]]*\]|\S{0,3})\s*")  # <|end|>, [CLS], </s>, \n
_LOOKS_LIKE_A_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{18,}"
    r"|sk-[\w-]{24,}|xox[abprs]-[\w-]{10,}|AKIA[A-Z0-9]{16}|wandb_v1_\w{20,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]*)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_URL_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<userinfo>[^/?#\s]*)@")
_REFERENCE = re.compile(
    r"\$[A-Z_][A-Z0-9_]*|\$\{(oc\.env:)?\w+\}"
)  # names a variable, holds no value
_OVERRIDE = re.compile(r"(?P<name>[+~]*-{0,2}[A-Za-z_][\w.\-/@]*)=(?P<value>.+)", re.DOTALL)
_ASSIGNMENT = re.compile(
    r"(?P<name>[A-Za-z_][\w.\-]*)(?P<sign>=|:\s*)(?P<value>\"[^\"]*\"|'[^']*'|[^&,}\s{\[][^&,}\s]*)"
)
# a digit or padding tells a credential from "basic evaluation"
_BEARER = re.compile(r"\b(?P<kind>Bearer|Basic)\s+(?=\S*[0-9=])[\w.~+/=-]{8,}", re.IGNORECASE)


def redact(config: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return a copy of config in which every secret is "<redacted>"; nothing is changed in place.

    Hidden are: values under keys that name a secret, whole groups included; strings that contain
    the value of an environment variable whose name names a secret (at least 8 characters);
    strings that look like a known kind of key; user names and passwords inside URLs; and the
    values of name=value overrides and --name value flags. Numbers, booleans and None stay, except
    numbers under a key such as `password`.
    """
    secrets = _environment_secrets(environ)
    return _redact_mapping(config, "", secrets)


def names_a_secret(name: str) -> bool:
    """Whether a key or variable of this name holds a secret: WANDB_API_KEY yes, num_tokens no."""
    return _names_a_definite_secret(name) or _names_an_access_token(name)


def redact_texts(texts: Iterable[str], environ: Mapping[str, str]) -> list[str]:
    """The same of texts that stand for themselves, such as overrides as they were typed."""
    return redact({"texts": list(texts)}, environ)["texts"]


def _environment_secrets(environ: Mapping[str, str]) -> tuple[str, ...]:
    values = {v.strip() for name, v in environ.items() if _variable_holds_a_secret(name)}
    return tuple(v for v in values if len(v) >= MIN_ENVIRONMENT_SECRET)


def _variable_holds_a_secret(name: str) -> bool:
    """Variables count sooner than keys do: hiding a needless one costs a few words."""
    if name.upper() in _NO_SECRET_VARIABLES:
        return False
    parts = name.upper().split("_")
    return names_a_secret(name) or parts[-1].endswith(_VARIABLE_ENDS) or "AUTH" in parts


def _redact_value(value: Any, key: str, secrets: tuple[str, ...]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and (value in ("", REDACTED) or _REFERENCE.fullmatch(value)):
        return value
    if _names_a_definite_secret(key):
        return REDACTED
    if isinstance(value, str):
        if _names_an_access_token(key) and not _TEXT_TOKEN_VALUE.fullmatch(value):
            return REDACTED
        return _redact_text(value, secrets)
    if isinstance(value, Mapping):
        return _redact_mapping(value, key, secrets)
    if isinstance(value, (list, tuple)):
        items = _redact_items(value, key, secrets)
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, (set, frozenset)):
        return {_redact_value(item, key, secrets) for item in value}
    if isinstance(value, (bytes, os.PathLike)):
        text = os.fsdecode(value)
        hidden = _redact_value(text, key, secrets)
        return value if hidden == text else hidden
    return value


def _redact_mapping(
    mapping: Mapping[Any, Any], key: str, secrets: tuple[str, ...]
) -> dict[Any, Any]:
    redacted: dict[Any, Any] = {}
    for name, value in mapping.items():
        # hf_token: {value: ...} hides what is inside as hf_token itself would be hidden
        inner = key if _names_an_access_token(key) else str(name)
        shown = _redact_text(name, secrets) if isinstance(name, str) else name
        redacted[shown] = _redact_value(value, inner, secrets)
    return redacted


def _redact_items(items: Any, key: str, secrets: tuple[str, ...]) -> list[Any]:
    redacted, previous = [], None
    for item in items:
        is_flag_value = (
            isinstance(previous, str)
            and re.fullmatch(r"--?[A-Za-z][\w.-]*", previous)
            and names_a_secret(previous)
            and isinstance(item, str)
            and not item.startswith("-")
        )
        redacted.append(REDACTED if is_flag_value else _redact_value(item, key, secrets))
        previous = item
    return redacted


def _redact_text(text: str, secrets: tuple[str, ...]) -> str:
    decoded = unquote(text)
    if any(secret in text or secret in decoded for secret in secrets):
        return REDACTED
    if _LOOKS_LIKE_A_SECRET.search(text):
        return REDACTED
    text = _URL_USERINFO.sub(_redact_userinfo, text)
    override = _OVERRIDE.fullmatch(text)
    if override and names_a_secret(_last_part(override["name"])):
        value = _redact_value(override["value"], _last_part(override["name"]), ())
        return f"{override['name']}={value}"
    text = _BEARER.sub(lambda match: f"{match['kind']} {REDACTED}", text)
    return _ASSIGNMENT.sub(_redact_assignment, text)


def _redact_userinfo(match: re.Match[str]) -> str:
    # ssh://git@host names an account; over HTTP a lone user name is often the token itself
    is_account_only = ":" not in match["userinfo"] and not match["scheme"].lower().startswith(
        "http"
    )
    return match[0] if is_account_only else f"{match['scheme']}://{REDACTED}@"


def _redact_assignment(match: re.Match[str]) -> str:
    name, value = _last_part(match["name"]), match["value"]
    # "token: x" with a colon is ordinary prose or code, "password: x" is not
    is_secret = names_a_secret(name) if match["sign"] == "=" else _names_a_definite_secret(name)
    if not is_secret:
        return match[0]
    return f"{match['name']}{match['sign']}{_redact_value(value, name, ())}"


def _last_part(dotted: str) -> str:
    return dotted.rsplit(".", 1)[-1]


def _words(name: str) -> list[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return re.findall(r"[a-z]+|\d+", spaced.lower())


def _names_a_definite_secret(name: str) -> bool:
    words = _words(name)
    if words in (["auth"], ["pass"]) or (words[-1:] == ["pwd"] and len(words) > 1):
        return True
    return not _SECRET_WORDS.isdisjoint(words) or any(
        before in _WORDS_BEFORE_KEY and word in ("key", "keys")
        for before, word in itertools.pairwise(words)
    )


def _names_an_access_token(name: str) -> bool:
    words = _words(name)
    if not words:
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _TEXT_TOKEN_WORDS
    return words[-1] == "tokens" and before in _WORDS_BEFORE_TOKENS
