"""Say what this machine can do, and what to do where something is missing or broken.

Exit code 0 where training can run, 1 where a check failed. Needs no package: it also answers where
torch or hydra is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# also without an installation, which may be what is broken
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]


def main() -> int:
    """Check, print, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments, unknown = parser.parse_known_args()
    if unknown:
        print(f"error: {unknown[0]}: unknown; allowed: --json or nothing.", file=sys.stderr)
        return 2
    from moe.doctor import FAIL, as_json, examine, table
    from moe.waiting_threads import let_waiting_threads_sleep

    let_waiting_threads_sleep(os.environ)
    checks = examine()
    print(as_json(checks) if arguments.json else table(checks))
    return 1 if any(check.status == FAIL for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
