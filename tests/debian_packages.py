"""Programs that a test needs from the distribution: installed where that can be done."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping


def why_missing(package_of: Mapping[str, str]) -> str:
    """Install the Debian packages of the programs that are not on the path; why not, or nothing.

    package_of: program -> package.
    """
    # Debian keeps servers where a user's path may not look
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = sorted({p for name, p in package_of.items() if not shutil.which(name, path=path)})
    if not missing:
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"needs {', '.join(missing)}, and only root on Debian can install that here"
    install = ["install", "-y", "-qq", "--no-install-recommends", *missing]
    for words in (["update", "-qq"], install):
        done = subprocess.run(
            ["apt-get", *words], capture_output=True, text=True, timeout=280,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
        )  # fmt: skip
        if done.returncode != 0:
            return f"apt-get {words[0]} failed: {done.stderr.strip()[-300:]}"
    return ""
