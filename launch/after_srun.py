"""The end of one start of a SLURM job: say once what the ranks said, and exit with one code.

usage: python after_srun.py FOLDER SRUN_EXIT_CODE, as the batch script calls it
"""

from __future__ import annotations

import sys
from pathlib import Path

from launchers.rank_exit import DONE, SAVED, read_exits, verdict


def main() -> int:
    """Exit code 0 done, 75 saved and to be started again, else why not."""
    folder, code = Path(sys.argv[1]), int(sys.argv[2])
    told = read_exits(folder)
    ended = verdict(told, failed=f"a rank ended, srun says exit code {code}" if code else "")
    if ended.code == SAVED:
        print(f"launcher: {ended.message}", flush=True)
    elif ended.code != DONE:
        print(f"error: {ended.message}", file=sys.stderr, flush=True)
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
