"""Secrets are hidden wherever they sit in a configuration, and nothing else is."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from pathlib import Path

import pytest

from moe.config import TrainConfig
from moe.train.redact import REDACTED, names_a_secret, redact, redact_texts

SECRET = "q9Zr-Xw3_correct-horse-battery"

SECRET_NAMES = (
    "api_key", "apikey", "apiKey", "API-KEY", "openai.api_key", "WANDB_API_KEY", "wandbApiKey",
    "password", "db_password", "PGPASSWORD_VALUE.password", "passwd", "db_pwd", "passphrase",
    "secret", "client_secret", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "aws_session_token",
    "token", "hf_token", "HF_TOKEN", "access_token", "accessToken", "refresh_token", "auth_token",
    "github_token", "GH_TOKEN", "bearer_token", "api_tokens", "credential", "credentials",
    "google_credentials", "private_key", "ssh_private_key", "privateKey", "encryption_key",
    "signing_key", "authorization", "Authorization", "auth", "jwt", "WANDB_TOKEN", "secrets",
)  # fmt: skip

ORDINARY_NAMES = (
    "num_tokens", "tokens_seen", "tokenizer", "tokenizer_path", "sample_tokens", "use_cls_token",
    "evaluate_tokens", "max_new_tokens", "tokens_per_second", "eos_token", "bos_token",
    "pad_token", "pad_token_id", "unk_token", "mask_token", "sep_token", "cls_token",
    "stop_token", "image_token", "token_type", "token_id", "next_token", "num_key_value_heads",
    "num_kv_heads", "key", "keys", "key_bias", "query_key_norm", "author", "authors",
    "passes", "forward_pass", "bypass", "compass", "secretary", "keyboard", "monkey", "pwd",
    "PWD", "OLDPWD", "tokenization", "detokenize", "vocab_size", "run_dir", "project", "seed",
    "train_bytes", "TOKENIZERS_PARALLELISM", "special_tokens", "per_token", "host", "user",
)  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_value_under_a_secret_name_is_hidden(name: str) -> None:
    assert redact({name: SECRET}, {}) == {name: REDACTED}


@pytest.mark.parametrize("name", ORDINARY_NAMES)
def test_a_value_under_an_ordinary_name_stays(name: str) -> None:
    values = {name: 512, f"{name}_": True, "list": [name, f"{name}=512", f"--{name}", "512"]}
    assert redact(values, {}) == values
    assert redact({name: "plain text"}, {}) == {name: "plain text"}
    assert not names_a_secret(name)


@pytest.mark.parametrize("value", ["<|endoftext|>", "</s>", "[CLS]", "<s>", "\n", "", None, True])
def test_tokens_of_text_stay_even_under_a_bare_token_key(value: object) -> None:
    config = {"token": value, "my_token": value, "chat": {"custom_token": [value]}}
    assert redact(config, {}) == config


def test_numbers_are_hidden_under_a_password_but_not_under_a_token_count() -> None:
    config = {"password": 12345678, "token": 12345678, "secret": {"a": 1, "b": [2]}}
    assert redact(config, {}) == {"password": REDACTED, "token": 12345678, "secret": REDACTED}
    assert redact({"password": None, "use_password": True}, {})["use_password"] is True


def test_url_userinfo_is_hidden_and_the_rest_of_the_url_is_kept() -> None:
    urls = {
        f"https://user:{SECRET}@host.example/a?b=c#d": f"https://{REDACTED}@host.example/a?b=c#d",
        f"https://{SECRET}@host.example": f"https://{REDACTED}@host.example",
        f"postgresql+psycopg://me:{SECRET}@db:5432/x": f"postgresql+psycopg://{REDACTED}@db:5432/x",
        f"see http://a:{SECRET}@h/ and ftp://b:c@h": (
            f"see http://{REDACTED}@h/ and ftp://{REDACTED}@h"
        ),
        f"https://host.example/?x=1&access_token={SECRET}&y=2": (
            f"https://host.example/?x=1&access_token={REDACTED}&y=2"
        ),
    }
    assert redact({"sources": list(urls)}, {})["sources"] == list(urls.values())


def test_urls_without_userinfo_stay() -> None:
    urls = [
        "https://host.example/a/b@v1.2?x=me@host", "ssh://git@host.example/a.git",
        "git@host.example:a/b.git", "mail me@host.example", "s3://bucket/a@b", "12:30@noon",
        "basic evaluation of a bearer document", "the next token: foo",
    ]  # fmt: skip
    assert redact({"sources": urls}, {}) == {"sources": urls}


def test_values_of_secret_environment_variables_are_hidden_anywhere() -> None:
    environ = {"MY_SERVICE_TOKEN": SECRET, "HOME": "/home/me", "NUM_TOKENS": "12345678"}
    config = {
        "note": f"started with {SECRET} on node 3",
        "encoded": "https://h/?k=" + SECRET.replace("-", "%2D"),
        "deep": [{"x": ({"y": SECRET},)}],
        SECRET: 1,
        "home": "/home/me/runs",
        "count": "12345678",
    }
    assert redact(config, environ) == {
        "note": REDACTED, "encoded": REDACTED, "deep": [{"x": ({"y": REDACTED},)}],
        REDACTED: 1, "home": "/home/me/runs", "count": "12345678",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD", "OPENAI_KEY", "AZURE_STORAGE_KEY", "AZURE_OPENAI_KEY", "GITHUB_PAT",
        "KAGGLE_KEY", "COMET_KEY", "NGC_KEY", "S3_KEY", "DB_PASS", "REDIS_PASS",
        "RCLONE_CONFIG_PASS", "REDISCLI_AUTH", "SENTRY_DSN", "DOCKER_AUTH_CONFIG", "SMTP_PWD",
        "openaikey", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY",
    ],
)  # fmt: skip
def test_variables_are_secret_by_the_end_of_their_name(name: str) -> None:
    config = {"paths": {"data_dir": f"/data/{SECRET}/x"}}
    assert redact(config, {name: SECRET}) == {"paths": {"data_dir": REDACTED}}
    assert redact_texts(["seed=1", f"name={SECRET}"], {name: SECRET}) == ["seed=1", REDACTED]


def test_variables_that_only_end_alike_are_not() -> None:
    environ = {
        "PWD": "/work/checkout", "OLDPWD": "/work/before", "PATH": "/usr/bin",
        "SSH_AUTH_SOCK": "/tmp/agent", "NUM_TOKENS": "12345678", "KEYBOARD": "international",
    }  # fmt: skip
    config = {"values": list(environ.values())}
    assert redact(config, environ) == config


def test_short_environment_secrets_do_not_hide_ordinary_words() -> None:
    config = {"name": "tiny_moe", "schedule": "constant"}
    assert redact(config, {"API_KEY": "tiny", "PASSWORD": "", "TOKEN": " "}) == config
    assert redact(config, {"API_KEY": "constant"})["schedule"] == REDACTED  # 8 characters


def test_command_line_overrides_are_hidden_in_lists_and_in_text() -> None:
    overrides = [
        f"logging.api_key={SECRET}", f"+wandb.token={SECRET} with blanks", "train.steps=5",
        "--password", SECRET, "--num-tokens", "5", f"logging={{api_key: {SECRET}}}",
        f"Authorization: Bearer {SECRET}", f"curl -H 'X: Bearer {SECRET}'",
    ]  # fmt: skip
    shown = redact({"overrides": overrides}, {})["overrides"]
    assert SECRET not in json.dumps(shown)
    assert shown[0] == f"logging.api_key={REDACTED}"
    assert shown[2] == "train.steps=5"
    assert shown[3:7] == ["--password", REDACTED, "--num-tokens", "5"]


@pytest.mark.parametrize(
    "value",
    [
        "hf_" + "aB3" * 11, "ghp_" + "a1" * 18, "sk-proj-" + "x9" * 20, "AKIA" + "Q7" * 8,
        "-----BEGIN OPENSSH PRIVATE KEY-----\nabc", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.sig",
    ],
)  # fmt: skip
def test_well_known_kinds_of_keys_are_hidden_under_any_name(value: str) -> None:
    assert redact({"anything": f"x {value} y"}, {}) == {"anything": REDACTED}


def test_references_to_variables_stay_unresolved_and_readable() -> None:
    config = {"api_key": "${WANDB_API_KEY}", "token": "${oc.env:HF_TOKEN}", "password": "$PW"}
    assert redact(config, {}) == config
    for value in ("${oc.env:HF_TOKEN,real-secret-default}", "$ecret123", "$PW-and-more"):
        assert redact({"token": value}, {})["token"] == REDACTED


def test_the_default_configuration_is_left_as_it_is() -> None:
    config = dataclasses.asdict(TrainConfig())
    assert redact(config, {"WANDB_API_KEY": SECRET}) == config


def test_random_trees_lose_their_secrets_and_nothing_else() -> None:
    """Plant one canary in random trees, in a random way; the rest comes back equal."""
    source = random.Random(0)
    for _ in range(300):
        tree = _random_tree(source, depth=4)
        assert redact(tree, {"A_TOKEN": SECRET}) == tree
        planted = copy.deepcopy(tree)
        group = planted
        while (
            inner := [v for v in group.values() if isinstance(v, dict)]
        ) and source.random() < 0.7:
            group = source.choice(inner)
        name = source.choice(SECRET_NAMES)
        group[name] = source.choice([SECRET, [SECRET], {"a": SECRET}, (1, {"b": [SECRET]})])
        before = copy.deepcopy(planted)
        hidden = redact(planted, {})
        assert SECRET not in repr(hidden)
        assert planted == before, "redact changed its argument"
        assert redact(hidden, {}) == hidden, "redact is not idempotent"
        del group[name]
        assert _without(hidden, name) == planted


def test_paths_and_bytes_are_searched_too() -> None:
    config = {"path": Path("/data") / SECRET, "raw": SECRET.encode(), "ok": Path("/data/x")}
    shown = redact(config, {"X_SECRET": SECRET})
    assert shown == {"path": REDACTED, "raw": REDACTED, "ok": Path("/data/x")}


def _random_tree(source: random.Random, *, depth: int) -> dict[str, object]:
    leaves = [1, 2.5, True, None, "text", "def token(x): return x", ("a", 1), [3, [4]], "a=b c=d"]
    tree: dict[str, object] = {}
    for name in source.sample(ORDINARY_NAMES, k=source.randint(1, 4)):
        deeper = depth > 0 and source.random() < 0.5
        tree[name] = _random_tree(source, depth=depth - 1) if deeper else source.choice(leaves)
    return tree


def _without(tree: object, name: str) -> object:
    if isinstance(tree, dict):
        return {k: _without(v, name) for k, v in tree.items() if k != name}
    return tree
