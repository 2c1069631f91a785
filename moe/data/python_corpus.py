"""The corpus that needs no download: the documents on any machine that runs Python.

- code: the standard library's sources.
- reference: the docstrings of those sources, one document a module, and pydoc's topics.
- prose: licences, READMEs and descriptions of the installed packages, and the standard library's
  own text files.

A docstring is in code as well. Both documents have the module's file as their group, so a module is
trained on or held out as a whole and no docstring leaks. Licences that differ from an earlier one
only in their copyright lines are left out; other near-copies (the BSD licences) remain.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe.data.corpus import Document
from moe.data.source_files import OnSkip, walk_files
from moe.data.text_pieces import decoded
from moe.errors import DataError

# tests are absent from many distributions' Pythons, and hold deliberately malformed sources
LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
)
OWN_PACKAGE = "phimoe"  # its README changes from commit to commit, and the corpus should not
_PROSE_NAME = re.compile(r"^(licen[sc]e|copying|notice|readme|authors)", re.IGNORECASE)
_PROSE_SUFFIXES = ("", ".txt", ".md", ".rst")


def python_documents(*, on_skip: OnSkip) -> Iterator[Document]:
    """Yield code and reference module by module, then topics, then prose; the order is fixed."""
    library = Path(sysconfig.get_path("stdlib"))
    files = list(walk_files(library, left_out=LEFT_OUT_FOLDERS))
    for path in files:
        name = path.relative_to(library).as_posix()
        if path.suffix == ".py" and not name.startswith("_sysconfigdata"):
            # _sysconfigdata records the paths and compiler flags of one machine
            yield from _module_documents(path, name=name, on_skip=on_skip)
    for path in files:
        name = path.relative_to(library).as_posix()
        if path.suffix in (".txt", ".rst") and path.parent.name != "lib2to3":  # its grammars
            text = _read_text(path, origin=f"stdlib/{name}", on_skip=on_skip)
            if text is not None:
                yield Document(text, "prose", f"stdlib/{name}", f"stdlib/{name}")
    yield from _package_documents(on_skip=on_skip)


def reference_text(source: str, *, module: str) -> str:
    """The docstrings of a module's public classes and functions with their signatures, or "".

    Read from the syntax tree: nothing is imported or run.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    parts = []
    own = ast.get_docstring(tree)
    if own:
        parts.append(f"module {module}\n\n{own}")
    parts += _docstrings(tree, prefix=f"{module}.")
    return "\n\n".join(parts) + "\n" if parts else ""


def _docstrings(node: ast.Module | ast.ClassDef, *, prefix: str) -> Iterator[str]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if child.name.startswith("_") and not child.name.endswith("__"):
            continue
        text = ast.get_docstring(child)
        if isinstance(child, ast.ClassDef):
            if text:
                yield f"class {prefix}{child.name}\n\n{text}"
            yield from _docstrings(child, prefix=f"{prefix}{child.name}.")
        elif text:
            yield f"{prefix}{child.name}({ast.unparse(child.args)})\n\n{text}"


def _module_documents(path: Path, *, name: str, on_skip: OnSkip) -> Iterator[Document]:
    origin = f"stdlib/{name}"
    text = _read_text(path, origin=origin, on_skip=on_skip)
    if text is None:
        return
    if name == "pydoc_data/topics.py":
        yield from _topic_documents(text)
        return
    if name.startswith("encodings/") and re.search(r"^(de|en)coding_(table|map)\b", text, re.M):
        on_skip(origin, "generated character table")
        return
    yield Document(text, "code", origin, origin)
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    reference = reference_text(text, module=module)
    if reference:
        yield Document(reference, "reference", f"{origin}#docstrings", origin)


def _topic_documents(source: str) -> Iterator[Document]:
    """pydoc's topics: a file that assigns a dictionary of literal strings."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Dict):
            continue
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(value, ast.Constant):
                origin = f"stdlib/pydoc_data/topics.py#{key.value}"
                yield Document(str(value.value), "reference", origin, origin)


def _package_documents(*, on_skip: OnSkip) -> Iterator[Document]:
    seen: set[str] = set()
    for name, package in _packages().items():
        texts = [("description", package.metadata.json.get("description"))]
        for file in sorted(package.files or [], key=str):
            if _PROSE_NAME.match(file.name) and Path(file.name).suffix.lower() in _PROSE_SUFFIXES:
                path = Path(str(package.locate_file(file)))
                if path.is_file():
                    inner = str(file).replace("\\", "/")
                    text = _read_text(path, origin=f"{name}/{inner}", on_skip=on_skip)
                    texts.append((inner, text))
        for inner, text in texts:
            if not isinstance(text, str) or not text.strip():
                continue
            # metadata that is not UTF-8 arrives with half surrogates
            text = text.encode("utf-8", "replace").decode()
            wording = _wording(text)
            if wording in seen:
                on_skip(f"{name}/{inner}", "another package's text but for its copyright lines")
                continue
            seen.add(wording)
            yield Document(text, "prose", f"{name}/{inner}", f"package/{name}")


def _read_text(path: Path, *, origin: str, on_skip: OnSkip) -> str | None:
    try:
        text, reason = decoded(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    if text is None:
        on_skip(origin, reason)
    return text


def _packages() -> dict[str, importlib.metadata.Distribution]:
    """Installed packages of this interpreter by normal name, sorted; not those of PYTHONPATH."""
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    found = {}
    for package in importlib.metadata.distributions(path=list(folders)):
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
        if name and name != OWN_PACKAGE:
            found.setdefault(name, package)
    return dict(sorted(found.items()))


def _wording(text: str) -> str:
    """A hash of a text without its copyright lines, case and layout."""
    lines = [line for line in text.lower().splitlines() if "copyright" not in line]
    words = " ".join(" ".join(lines).split())
    return hashlib.sha256(words.encode()).hexdigest()
