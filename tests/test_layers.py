"""Who may import whom: the table of layers, held by reading the tree and by running without extras.

A rule names a part of the tree and what its files may not import, or the only place where
something may be imported. Imports anywhere in a file count, also those inside functions, in
strings given to importlib.import_module, and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SHIPPED = ("moe", "kernels", "launch", "analysis")
STANDARD = sys.stdlib_module_names

CONFIGURATION = (
    "moe.config",
    "moe.config_checks",
    "moe.config_from_dict",
    "moe.errors",
    "moe.inference_config",
    "moe.launcher_config",
    "moe.model_config",
    "moe.watch_config",
)
# the packages that may hold its grouped product; the third is Hugging Face's, not our folder
MEGABLOCKS = ("megablocks", "grouped_gemm", "kernels", "huggingface_hub")
# path -> what it may import besides the standard library
ALLOWED = {
    "kernels/phi_kernels": {"torch", "triton", "phi_kernels"},
    "moe/config_checks.py": {"moe.errors"},
    "moe/config.py": set(CONFIGURATION),
    "moe/launcher_config.py": {"moe.config_checks", "moe.errors"},
    "moe/watch_config.py": {"moe.config_checks", "moe.errors"},
    "moe/model_config.py": {"moe.config_checks", "moe.errors"},
    "moe/inference_config.py": {"moe.config_checks", "moe.errors"},
    "moe/errors.py": set(),
    "moe/config_from_dict.py": {"moe.errors", "moe.right_key"},
    "moe/right_key.py": set(),
    "moe/model": {"torch", "phi_kernels", "moe.model", "moe.sparse", *CONFIGURATION},
    "moe/sparse": {"torch", "phi_kernels", "moe.sparse", *CONFIGURATION, *MEGABLOCKS},
    "moe/data": {
        "torch",
        "numpy",
        "sentencepiece",
        "tiktoken",
        "pyarrow",
        "moe.data",
        "moe.file_shares",
        "moe.progress_call",
        "moe.train.atomic_files",
        *CONFIGURATION,
    },
}
# path -> what it may not import, a submodule included
FORBIDDEN = {
    "moe/model": {"torch.distributed"},
    "moe/sparse": {"torch.distributed"},
    "moe/data": {"torch.distributed"},
    "moe": {"launch", "analysis", "command", "kernels"},
    "kernels": {"kernels"},
    "launch": {"kernels"},
    "analysis": {"deepspeed", "torch", "launch", "kernels"},
    "tests": {"kernels"},
}
# file -> what it alone may import in spite of the rule above
EXEMPT = {"moe/sparse/megablocks_experts.py": {"kernels"}}
# what -> the only places that may import it
ONLY_IN = {
    "hydra": ("launch", "tests"),
    "omegaconf": ("launch", "tests"),
    "deepspeed": ("moe/parallel/deepspeed_engine.py", "tests"),
    "wandb": ("moe/train/wandb_run.py", "tests"),
    **dict.fromkeys(
        ("marimo", "plotly"),
        ("analysis/explore", "launch/explore.py", "launch/page_server.py", "tests"),
    ),
    "transformers": ("kernels/bench", "moe/in_transformers.py", "tests"),
    **dict.fromkeys(MEGABLOCKS, ("moe/sparse/megablocks_experts.py",)),
}
# folders that are no packages: kernels/ would hide the package of that name on other machines
NO_PACKAGE = ("kernels", "conf", "launch", "tests")


def imports_of(source: str, *, package: str = "") -> set[str]:
    """Full dotted names that source imports; `from a import b` gives a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and _imports_by_name(node.func):
            name = _leading_text(node.args[0])
            found |= {name.rstrip(".")} if name else set()
    return found


def _imports_by_name(function: ast.expr) -> bool:
    text = ast.unparse(function)
    return text in ("__import__", "import_module", "importlib.import_module")


def _leading_text(node: ast.expr) -> str:
    """The constant text, or what an f-string begins with."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return str(node.value) if is_text else ""  # type: ignore[attr-defined]


def is_under(name: str, roots: set[str]) -> bool:
    """a.b.c is under a, a.b and a.b.c."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def files_of(path: str) -> list[Path]:
    whole = REPOSITORY / path
    return [whole] if whole.is_file() else sorted(whole.rglob("*.py"))


def imports_under(path: str) -> list[tuple[str, str]]:
    """(file, imported name) of every file at or below path."""
    pairs = []
    for file in files_of(path):
        relative = file.relative_to(REPOSITORY)
        package = ".".join(relative.parent.parts)
        names = imports_of(file.read_text(encoding="utf-8"), package=package)
        pairs += [(relative.as_posix(), name) for name in sorted(names)]
    return pairs


@pytest.mark.parametrize("path", ALLOWED)
def test_a_layer_imports_only_what_it_may(path: str) -> None:
    allowed = ALLOWED[path] | STANDARD
    assert files_of(path)
    wrong = [
        f"{file}: {name}"
        for file, name in imports_under(path)
        # `from moe import errors` gives moe too, which holds nothing but its docstring
        if not is_under(name, allowed) and name != "moe"
    ]
    assert wrong == []


@pytest.mark.parametrize("path", FORBIDDEN)
def test_a_layer_does_not_import_what_is_above_it(path: str) -> None:
    pairs = imports_under(path)
    assert pairs
    wrong = [
        f"{file}: {name}"
        for file, name in pairs
        if is_under(name, FORBIDDEN[path] - EXEMPT.get(file, set()))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_imported_in_its_place_only(package: str) -> None:
    users = {
        file
        for path in (*SHIPPED, "tests")
        for file, name in imports_under(path)
        if is_under(name, {package})
    }
    places = ONLY_IN[package]
    assert users  # a rule about nothing would hold for ever
    assert [f for f in sorted(users) if not any(is_below(f, place) for place in places)] == []


def is_below(file: str, place: str) -> bool:
    return file == place or file.startswith(f"{place}/")


@pytest.mark.parametrize("folder", NO_PACKAGE)
def test_a_folder_that_is_no_package_holds_no_init_file(folder: str) -> None:
    assert (REPOSITORY / folder).is_dir()
    found = list((REPOSITORY / folder).rglob("__init__.py"))
    assert [p for p in found if "phi_kernels" not in p.parts] == []


def test_every_package_has_an_init_file_that_only_says_what_it_is() -> None:
    assert (REPOSITORY / "kernels/phi_kernels/__init__.py").exists()
    for folder in sorted({file.parent for file in files_of("moe")}):
        init = folder / "__init__.py"
        assert init.exists(), folder
        body = ast.parse(init.read_text()).body
        assert [type(node) for node in body] == [ast.Expr], init  # a docstring


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import deepspeed", "deepspeed"),
        ("import deepspeed.ops as o", "deepspeed.ops"),
        ("from torch import distributed", "torch.distributed"),
        ("from torch.distributed import all_reduce", "torch.distributed"),
        ("def f():\n  import hydra", "hydra"),
        ("if TYPE_CHECKING:\n  import wandb", "wandb"),
        ("import importlib\nimportlib.import_module('kernels.x')", "kernels.x"),
        ("import importlib\nimportlib.import_module(f'kernels.{x}')", "kernels"),
        ("from . import run", "moe.train.run"),
        ("from ..parallel.engine import Engine", "moe.parallel.engine"),
        ("from .. import data", "moe.data"),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: str) -> None:
    assert expected in imports_of(source, package="moe.train")


def test_text_and_names_that_only_look_alike_are_not_imports() -> None:
    source = "x = 'import wandb'\nfrom moe import errors\nmoe.kernels = 1\n"
    names = imports_of(source)
    assert not is_under("torchvision", {"torch"})
    assert not any(is_under(name, {"wandb", "kernels"}) for name in names)


# what a bare GPU machine has, by file name: torch, triton, numpy, safetensors, what they depend on
BARE = (
    "torch", "torchgen", "functorch", "triton", "numpy", "numpy.libs", "safetensors",
    "typing_extensions.py", "sympy", "mpmath", "networkx", "filelock", "jinja2", "markupsafe",
    "fsspec", "setuptools", "nvidia", "cuda",
)  # fmt: skip


def run_without_extras(code: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run code where no package can be found but those of BARE and our own two."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    installed, bare = Path(spec.origin).parents[1], tmp_path / "bare"
    bare.mkdir()
    for name in BARE:
        if (installed / name).exists():
            (bare / name).symlink_to(installed / name)
    script = tmp_path / "script.py"
    script.write_text(code)
    paths = [REPOSITORY, REPOSITORY / "kernels", bare]
    return subprocess.run(
        [sys.executable, "-S", str(script)],  # -S: without the site-packages folder
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


TRAIN_A_STEP = """
import dataclasses
from pathlib import Path
import torch
import phi_kernels
from moe.config import OptimConfig, ParallelConfig, RouterConfig
from moe.model_config import ModelConfig
from moe.generate import Sampling, generate
from moe.model.transformer import build_model
from moe.parallel.engine import make_engine
from moe.parallel.processes import join_processes
from moe.sparse.noise import token_keys
from moe.train.checkpoint import find_checkpoint, save_checkpoint
from moe.train.state import load_model

nano = ModelConfig(vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
                   head_dim=8, intermediate_size=8, num_experts=4)
model = build_model(nano, RouterConfig(), seed=0)
engine = make_engine(model, OptimConfig(), ParallelConfig(engine="plain"), join_processes())
tokens = torch.arange(24).view(2, 12)
keys = token_keys(0, torch.arange(2), seq_len=12)
loss = engine.forward(tokens, key_BS=keys).logits.float().logsumexp(dim=-1).mean()
engine.backward(loss, is_last=True)
print("norm", engine.step(lr=1e-3) > 0)
tensors = {"model": {n: p.detach() for n, p in model.named_parameters()}}
save_checkpoint(Path("saved"), 1, tensors=tensors, state={"a": 1}, keep_last=1)
other = build_model(nano, RouterConfig(), seed=1)
load_model(other, find_checkpoint(Path("saved"), on_skip=print))
print("equal", all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters())))
model.eval()
print("new", len(list(generate(model, [1, 2], Sampling(max_new_tokens=3), stop_ids=set()))))
"""
IMPORT_EVERYTHING = """
import importlib
for name in NAMES:
    importlib.import_module(name)
print("imported", len(NAMES))
"""


def test_a_machine_with_torch_alone_trains_saves_loads_and_generates(tmp_path: Path) -> None:
    done = run_without_extras(TRAIN_A_STEP, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["norm True", "equal True", "new 3"]


def test_every_module_of_moe_and_phi_kernels_imports_with_torch_alone(tmp_path: Path) -> None:
    names = [
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for root, path in ((REPOSITORY, "moe"), (REPOSITORY / "kernels", "kernels/phi_kernels"))
        for file in files_of(path)
    ]
    assert {"moe.train.run", "moe.parallel.deepspeed_engine", "phi_kernels"} <= set(names)
    done = run_without_extras(f"NAMES = {names!r}\n{IMPORT_EVERYTHING}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"imported {len(names)}\n"


@pytest.mark.parametrize(
    "package", ["hydra", "deepspeed", "wandb", "sentencepiece", "tiktoken", "rich"]
)
def test_the_bare_machine_really_is_bare(package: str, tmp_path: Path) -> None:
    assert importlib.util.find_spec(package) is not None
    done = run_without_extras(f"import {package}", tmp_path)
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: No module named {package!r}"
