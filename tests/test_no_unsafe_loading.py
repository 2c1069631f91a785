"""No shipped file can execute what it loads: no pickles, no evaluated text, no shell strings."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("moe", "kernels", "launch", "analysis")

FORBIDDEN_IMPORTS = {
    "pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib",
}  # fmt: skip
FORBIDDEN_CALLS = {
    "torch.load": "unpickles",
    "torch.save": "pickles",
    "torch.jit.load": "loads code",
    "torch.hub.load": "downloads and executes code",
    "pandas.read_pickle": "unpickles",
    "yaml.load": "can build any object",
    "yaml.load_all": "can build any object",
    "yaml.unsafe_load": "can build any object",
    "yaml.unsafe_load_all": "can build any object",
    "yaml.full_load": "could build any object",
    "eval": "executes text",
    "exec": "executes text",
    "builtins.eval": "executes text",
    "builtins.exec": "executes text",
    "os.system": "runs a shell string",
    "os.popen": "runs a shell string",
    "subprocess.getoutput": "runs a shell string",
    "subprocess.getstatusoutput": "runs a shell string",
    "hydra.utils.instantiate": "calls what a configuration names",
    "hydra.utils.call": "calls what a configuration names",
    "hydra.utils.get_method": "imports what a configuration names",
    "hydra.utils.get_class": "imports what a configuration names",
    "hydra.utils.get_object": "imports what a configuration names",
}
# a keyword that must be absent or the constant False
FORBIDDEN_KEYWORDS = {
    "allow_pickle": "unpickles arrays",
    "shell": "runs a shell string",
    "trust_remote_code": "executes code from a model's folder",
}


def unsafe_uses(source: str) -> list[str]:
    """What source contains of the lists above, as "line: what: why" in the order of lines."""
    tree = ast.parse(source)
    names = _imported_names(tree)
    found = [
        (node.lineno, text)
        for node in ast.walk(tree)
        for text in _problems_of(node, names)
        if isinstance(node, (ast.expr, ast.stmt))
    ]
    return [f"{line}: {text}" for line, text in sorted(found)]


def _imported_names(tree: ast.Module) -> dict[str, str]:
    """Local name -> the full dotted name that it stands for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def _problems_of(node: ast.AST, names: dict[str, str]) -> Iterator[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        relative = isinstance(node, ast.ImportFrom) and node.level
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if not relative and module.split(".")[0] in FORBIDDEN_IMPORTS:
                yield f"import {module}: unpickles"
    # a mention is enough: `load = torch.load` or `map(eval, texts)` is a call in other words
    if isinstance(node, (ast.Attribute, ast.Name)):
        dotted = _dotted(node, names)
        if dotted in FORBIDDEN_CALLS:
            yield f"{dotted}: {FORBIDDEN_CALLS[dotted]}"
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_KEYWORDS and not _is_false(keyword.value):
                yield f"{keyword.arg}: {FORBIDDEN_KEYWORDS[keyword.arg]}"
        # allow_pickle is the third positional parameter of numpy.load
        if _dotted(node.func, names) == "numpy.load" and len(node.args) > 2:
            yield f"allow_pickle: {FORBIDDEN_KEYWORDS['allow_pickle']}"
        module = node.args[0] if node.args else None
        importing = _dotted(node.func, names) in ("__import__", "importlib.import_module")
        name = str(module.value) if isinstance(module, ast.Constant) else ""
        if importing and name.split(".")[0] in FORBIDDEN_IMPORTS:
            yield f"import {name}: unpickles"
    if isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            keyword = key.value if isinstance(key, ast.Constant) else None
            if keyword in FORBIDDEN_KEYWORDS and not _is_false(value):
                yield f"{keyword}: {FORBIDDEN_KEYWORDS[keyword]}"


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = _dotted(node.value, names)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def shipped_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def test_the_tree_is_really_read() -> None:
    names = {path.relative_to(REPOSITORY).as_posix() for path in shipped_files()}
    assert {"moe/config.py", "moe/train/checkpoint.py"} <= names


def test_no_shipped_file_can_execute_what_it_loads() -> None:
    found = [
        f"{path.relative_to(REPOSITORY).as_posix()}:{use}"
        for path in shipped_files()
        for use in unsafe_uses(path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle", "import pickle"),
        ("import os, pickle as p", "import pickle"),
        ("from pickle import loads", "import pickle"),
        ("def f():\n  import _pickle", "import _pickle"),
        ("import marshal", "import marshal"),
        ("import shelve", "import shelve"),
        ("import dill", "import dill"),
        ("from cloudpickle.cloudpickle import dumps", "import cloudpickle.cloudpickle"),
        ("import joblib", "import joblib"),
        ("__import__('pickle')", "import pickle"),
        ("import importlib\nimportlib.import_module('marshal')", "import marshal"),
        ("import torch\ntorch.load('x', weights_only=True)", "torch.load"),
        ("import torch as t\nt.load('x')", "torch.load"),
        ("from torch import load\nload('x')", "torch.load"),
        ("from torch import load as read\nread('x')", "torch.load"),
        ("import torch\nf = torch.load", "torch.load"),
        ("import torch\ntorch.save(1, 'x')", "torch.save"),
        ("import torch.jit\ntorch.jit.load('x')", "torch.jit.load"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("import numpy as np\nnp.load('x', None, True)", "allow_pickle"),
        ("from numpy import load\nload('x', allow_pickle=flag)", "allow_pickle"),
        ("import yaml\nyaml.load(x, Loader=yaml.SafeLoader)", "yaml.load"),
        ("from yaml import unsafe_load as u\nu(x)", "yaml.unsafe_load"),
        ("import yaml\nyaml.full_load(x)", "yaml.full_load"),
        ("eval('1')", "eval"),
        ("exec('1')", "exec"),
        ("list(map(eval, texts))", "eval"),
        ("import builtins\nbuiltins.exec('1')", "builtins.exec"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("import subprocess\nsubprocess.run('ls', shell=flag)", "shell"),
        ("import os\nos.system('ls')", "os.system"),
        ("from os import popen\npopen('ls')", "os.popen"),
        ("f(trust_remote_code=True)", "trust_remote_code"),
        ("f(**{'trust_remote_code': True})", "trust_remote_code"),
        ("import hydra\nhydra.utils.instantiate(c)", "hydra.utils.instantiate"),
        ("from hydra.utils import instantiate\ninstantiate(c)", "hydra.utils.instantiate"),
        ("from hydra import utils as u\nu.instantiate(c)", "hydra.utils.instantiate"),
        ("from hydra.utils import get_class\nget_class(c)", "hydra.utils.get_class"),
    ],
)
def test_each_forbidden_use_is_found(source: str, expected: str) -> None:
    uses = unsafe_uses(source)
    assert uses
    assert uses[-1].split(": ")[1] == expected


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "self.exec(1)",
        "import json\njson.loads(x)",
        "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
        "import yaml\nyaml.safe_load(x)",
        "import subprocess\nsubprocess.run(['ls'], shell=False)",
        "from . import pickle",
        "from safetensors.torch import load_file\nload_file('x')",
        "f(trust_remote_code=False)",
        "x = 'torch.load(path)'  # torch.load",
        "engine.load(1)",
    ],
)
def test_what_only_looks_alike_is_allowed(source: str) -> None:
    assert unsafe_uses(source) == []
