"""Writes a ModelConfig as the YAML file of a model group: FOLDER/model/NAME.yaml is model=NAME."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from moe.config import RouterConfig
from moe.model_config import ModelConfig

_WIDTH = 98
# a model says its whole shape; what else it has is said where it differs from the default
_ALWAYS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    "intermediate_size", "num_experts", "norm", "norm_eps", "attention_bias", "head_bias",
    "max_position",
)  # fmt: skip


def model_yaml(model: ModelConfig, router: RouterConfig, *, name: str, source: str) -> str:
    """Return the file's text; read back, it is the same model under the new name.

    The router's numbers have no place in a model's file: a comment gives them as overrides.
    """
    lines = [
        f"# {_one_line(source)}: {model.num_parameters():,} parameters"
        + (f", {model.num_parameters(active=True):,} of them active." if model.is_sparse else ".")
    ]
    if model.is_sparse:
        lines.append("# Its router, for the command line:")
        lines.append(f"#   {' '.join(router_overrides(router))}")
    lines.append(f"name: {_scalar(name)}")
    default = ModelConfig()
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name == "name":
            continue
        if dataclasses.is_dataclass(value):
            lines += _group(field.name, value, getattr(default, field.name))
        elif field.name in _ALWAYS or value != getattr(default, field.name):
            lines += _entry(field.name, value, indent="")
    return "\n".join(lines) + "\n"


def router_overrides(router: RouterConfig) -> list[str]:
    """key=value of what differs from the default router, for the command line."""
    default = RouterConfig()
    return [
        f"router.{field.name}={_scalar(getattr(router, field.name))}"
        for field in dataclasses.fields(router)
        if getattr(router, field.name) != getattr(default, field.name)
    ] or ["router=sparsemixer"]


def _group(key: str, value: Any, default: Any) -> list[str]:
    lines = []
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if inner != getattr(default, field.name):
            lines += _entry(field.name, inner, indent="  ")
    return [f"{key}:", *lines] if lines else []


def _entry(key: str, value: Any, *, indent: str) -> list[str]:
    if not isinstance(value, tuple):
        return [f"{indent}{key}: {_scalar(value)}"]
    flat = f"{indent}{key}: [{', '.join(map(_scalar, value))}]"
    if len(flat) <= _WIDTH:
        return [flat]
    lines, line = [f"{indent}{key}: ["], indent + " "
    for piece in map(_scalar, value):
        if len(line) + len(piece) + 2 > _WIDTH:
            lines.append(line)
            line = indent + " "
        line += f" {piece},"
    return [*lines, line, f"{indent}]"]


def _scalar(value: Any) -> str:
    """A YAML 1.1 scalar: floats keep every bit and have the point that the format asks for."""
    if isinstance(value, str):
        return json.dumps(value) if value in _WORDS or not value.isidentifier() else value
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    if isinstance(value, float) and "e" in text and "." not in text:
        return text.replace("e", ".0e")
    return text


# YAML reads these as something other than text
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"} | {
    word.title() for word in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
}


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
