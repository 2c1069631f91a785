"""How a prepared folder is reused, refused, or replaced; a stop at any moment loses nothing."""

from __future__ import annotations

import errno
import json
import re
import shutil
from pathlib import Path

from moe.data.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Manifest, read_manifest
from moe.data.verified_stamp import STAMP_NAME
from moe.errors import DataError
from moe.train.atomic_files import sync_folder

_OWN_NAME = re.compile(
    rf"{re.escape(MANIFEST_NAME)}|{re.escape(TOKENIZER_NAME)}"
    rf"|{re.escape(STAMP_NAME)}|\.{re.escape(STAMP_NAME)}\.\d+"  # the second: half written
    rf"|({'|'.join(SPLITS)})(-\d+\.tokens|\.documents\.npy)"
)


def existing_manifest(target: Path, *, settings: str, overwrite: bool) -> Manifest | None:
    """The manifest of a folder to reuse, or None if one must be built.

    Raises DataError for a folder of another configuration, a damaged one, or one that was not
    made by prepare; with overwrite only for the last, or when other files are in it.
    """
    if not target.exists():
        return None
    if not target.is_dir():
        raise DataError(f"paths.data_dir: {target} is a file; give a new folder.")
    names = {path.name for path in target.iterdir()}
    if not names:
        return None
    if MANIFEST_NAME not in names:
        raise DataError(
            f"paths.data_dir: {target} is not empty and was not made by prepare_data "
            f"(it has no {MANIFEST_NAME}). Give a new folder; nothing was changed."
        )
    foreign = sorted(name for name in names if not _OWN_NAME.fullmatch(name))
    if overwrite and foreign:
        raise DataError(
            f"paths.data_dir: {target} also holds {foreign[0]!r}, which overwrite=true would "
            "delete. Move it, or give a new folder; nothing was changed."
        )
    if overwrite and not _can_be_reused(target, settings):
        return None
    manifest = read_manifest(target, verify=True)
    if manifest.settings != settings:
        raise DataError(
            f"paths.data_dir: {target} was prepared with another configuration: "
            f"{_differences(manifest.settings, settings)}. Give another paths.data_dir, or "
            "overwrite=true to replace it."
        )
    return manifest


def _can_be_reused(target: Path, settings: str) -> bool:
    try:
        return read_manifest(target, verify=True).settings == settings
    except DataError:
        return False


def _differences(old_text: str, new_text: str) -> str:
    old, new = json.loads(old_text), json.loads(new_text)
    parts = []
    for key in sorted({*old, *new}):
        there, here = old.get(key, "not set"), new.get(key, "not set")
        if there != here and key == "the files of data.sources":
            parts.append(f"{key} have changed")
        elif there != here:
            parts.append(f"{key} is {there} there, {here} here")
    return "; ".join(parts)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def is_half_replaced(target: Path) -> bool:
    """Whether a replacement was stopped between its two renames."""
    return _aside(target).is_dir()


def undo_half_replacement(target: Path) -> None:
    """Undo a replacement that was stopped between its two renames."""
    aside = _aside(target)
    if is_half_replaced(target):
        if target.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(target)


def install_folder(build: Path, target: Path, *, overwrite: bool) -> bool:
    """Rename build to target; a replaced folder is deleted only after that.

    Returns False if the target is not empty and may not be replaced.
    """
    sync_folder(build)
    aside = _aside(target)
    if overwrite and target.exists():
        target.rename(aside)
    try:
        build.rename(target)
    except OSError as error:
        undo_half_replacement(target)
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync_folder(target.parent)
    if aside.exists():
        shutil.rmtree(aside)
    return True
