"""Compile the products of avx512/ on the machine that runs them, once, and load them.

Wheels carry no binary: a C++ compiler (c++, or what CXX names) makes the library in about seven
seconds, against the headers in torch, and it is kept in torch's folder for extensions
(TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions). Nothing else waits for a process that died
on the way: the lock is the kernel's, and a library appears as a whole or not at all.

PHI_KERNELS_AVX512=0 turns it off. Without it bfloat16 experts on a CPU run on oneDNN.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "avx512"
SWITCH = "PHI_KERNELS_AVX512"
_CPU_INFO = Path("/proc/cpuinfo")
_NEEDED = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma", "bmi2"}
# with tiles of its own in the processor, oneDNN is faster than anything made of AVX-512
_BETTER = {"amx_bf16"}
# fmt: off
_FLAGS = [
    "-std=c++20", "-O3", "-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512",
    "-fopenmp", "-fPIC", "-shared", "-w",  # -w: the warnings are those of headers
    "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512",
]
# fmt: on
_SECONDS = 300


def is_available() -> bool:
    """Whether torch.ops.phi_avx512 can be used on this machine; the first call may compile it."""
    return not reason_against() and not load_error()


@functools.cache
def load_error() -> str:
    """Load the library, compiled if it is new; what went wrong, empty where nothing did.

    Also said on stderr, once: what a user then measures is another library.
    """
    try:
        torch.ops.load_library(str(_built()))
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        message = _first_error(error)
        print(
            f"phi_kernels: bfloat16 experts run on oneDNN, slower: {message}\n"
            f"phi_kernels: {remedy(message)}, or set {SWITCH}=0",
            file=sys.stderr,
        )
        return message
    return ""


def remedy(message: str) -> str:
    """What to do about a message of load_error."""
    if message.startswith("[Errno"):  # of the folder, not of the compiler
        return "set TORCH_EXTENSIONS_DIR to a folder that you may write"
    return "install a C++ compiler (Debian: g++)"


@functools.cache
def reason_against() -> str:
    """Why this machine does not even try; empty where it does."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0"
    if platform.system() != "Linux":
        return "not Linux"
    flags = _cpu_flags(_CPU_INFO)
    if missing := _NEEDED - flags:
        return f"the processor has no {', '.join(sorted(missing))}"
    if better := _BETTER & flags:
        return f"the processor has {', '.join(better)}, which oneDNN uses"
    return ""


def _cpu_flags(cpu_info: Path) -> set[str]:
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError:
        return set()
    return set(
        next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split()
    )


def _built() -> Path:
    """The library for these sources and this torch; compiled by one process, others wait for it."""
    import fcntl  # Windows has none, and phi_kernels is imported there too

    folder = _cache_folder()
    library = folder / f"phi_avx512_{_key()}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise OSError(f"no C++ compiler: {compiler} was not found")
    print("phi_kernels: compiling the CPU's bfloat16 experts, once", file=sys.stderr)
    torch_folder = Path(torch.__file__).parent
    # OpenMP is not linked: its functions are those of the library that torch has loaded
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        subprocess.run(
            [compiler, *_FLAGS, "-isystem", torch_folder / "include", SOURCES / "experts.cpp",
             "-o", made, *libraries],
            check=True, capture_output=True, text=True, timeout=_SECONDS,
        )  # fmt: skip
        made.replace(library)


def _cache_folder() -> Path:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return (Path(root) if root else Path.home() / ".cache" / "torch_extensions") / "phi_kernels"


def _key() -> str:
    digest = hashlib.sha256("\0".join([torch.__version__, *_FLAGS]).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _first_error(error: Exception) -> str:
    """Of a compiler's many lines the one that says what is wrong."""
    lines = (getattr(error, "stderr", None) or str(error)).splitlines()
    return next((line for line in lines if "error" in line), (lines or [type(error).__name__])[0])
