"""What the command hands to the page: a JSON file that names the sides' files."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.explore.index import open_index
from analysis.explore.maps import Side
from analysis.explore.run_log import open_log
from moe.config_from_dict import from_dict
from moe.errors import ConfigError, DataError
from moe.train.atomic_files import read_small_file, replace_file

_LIMIT_BYTES = 2**20


@dataclass(frozen=True)
class SideFiles:
    """One side: what it is, and where its numbers lie."""

    title: str
    facts: tuple[tuple[str, str], ...]
    log: str | None = None
    index: str | None = None


@dataclass(frozen=True)
class PageFile:
    """One side or two; what is known of both together, or why nothing is."""

    sides: tuple[SideFiles, ...]
    pair: str | None = None
    pair_note: str = ""
    notes: tuple[str, ...] = ()


def save_page(path: Path, page: PageFile) -> None:
    """Write it for open_page."""
    replace_file(path, json.dumps(asdict(page)).encode())


def open_page(path: Path) -> PageFile:
    """Read what save_page wrote. Raises DataError where it is missing or damaged."""
    try:
        return from_dict(PageFile, json.loads(read_small_file(path, limit_bytes=_LIMIT_BYTES)))
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(f"{path}: is no page ({error}). Start launch/explore.py again.") from None


def open_side(files: SideFiles) -> Side:
    """The numbers of a side. Raises DataError where a file is missing or damaged."""
    return Side(
        title=files.title,
        facts=files.facts,
        log=None if files.log is None else open_log(Path(files.log)),
        index=None if files.index is None else open_index(Path(files.index)),
    )
