"""Sets a trap in ranks that a launcher starts: Python itself imports a file of this name.

With this folder on PYTHONPATH. A trap that has sprung is not set again, in whatever restart.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_folder = Path(os.environ.get("PHIMOE_TEST_TRAP_FOLDER", ""))
if os.environ.get("PHIMOE_TEST_TRAP") and "RANK" in os.environ:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import traps

    if not (_folder / traps.NOTES).exists():
        traps.install(os.environ["PHIMOE_TEST_TRAP"], _folder)
