"""What this machine can do: every check of launch/doctor.py, each with what to do if it fails.

Standard library only at import, so that it also runs where torch or hydra is missing.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OK, WARN, FAIL = "ok", "warn", "FAIL"
_IMPORT_SECONDS = 180.0
_RANKS_SECONDS = 60.0
_NEIGHBOUR_SECONDS = 1.0
_LITTLE_SPACE_GIB, _NO_SPACE_GIB = 5.0, 0.2


@dataclass(frozen=True)
class Check:
    """One line of the report; fix is empty where nothing is to be done."""

    name: str
    status: str  # OK, WARN or FAIL
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Package:
    """A distribution, the module it brings, the oldest version that works, and why it is needed."""

    name: str
    module: str
    floor: str
    is_required: bool
    why: str
    below: str = ""  # the first version that nobody has tried


# the floors are those of pyproject.toml; a test compares them
PACKAGES = (
    Package("numpy", "numpy", "2.0", True, "arrays"),
    Package("torch", "torch", "2.11", True, "grouped_mm with gradients", below="2.14"),
    Package("triton", "triton", "3.6", False, "GPU kernels", below="3.8"),
    Package("safetensors", "safetensors", "0.5", True, "checkpoints"),
    Package("sentencepiece", "sentencepiece", "0.2.1", True, "older: CVE-2026-1260"),
    Package("tiktoken", "tiktoken", "0.14", True, "phi-3-small's tokenizer"),
    Package("hydra-core", "hydra", "1.3.8", True, "configuration"),
    Package("deepspeed", "deepspeed", "0.19.8", True, "older: drops gradients on CPUs"),
    Package("matplotlib", "matplotlib", "3.9", True, "the picture of a run"),
    Package("pyarrow", "pyarrow", "18", False, "routing traces"),
    Package("rich", "rich", "13.9", False, "the live progress line"),
    Package("wandb", "wandb", "0.20", False, "else use logging=disabled"),
)


def examine() -> list[Check]:
    """Run every check, in the order of the report; takes about half a minute, mostly imports."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        packages = list(pool.map(check_package, PACKAGES))
    has_torch = all(p.status != FAIL for p in packages if p.name == "torch")
    checks = [check_python(), *packages, check_cores(), check_neighbours(), check_instructions()]
    if has_torch:
        checks += [check_cpu_experts(), *check_torch_devices(), *check_collectives()]
    return [*checks, check_folder(Path.cwd()), check_wandb()]


def check_python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < (3, 11):  # noqa: UP036 - this very check is for older ones
        return Check("python", FAIL, found, "install Python 3.11 or newer")
    return Check("python", OK, found)


def check_package(package: Package) -> Check:
    """Is it installed, new enough, and does it import? The import runs in a process of its own."""
    install = f"pip install '{package.name}>={package.floor}'"
    bad = FAIL if package.is_required else WARN
    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return Check(package.name, bad, f"not installed ({package.why})", install)
    if _numbers(version) < _numbers(package.floor):
        found = f"{version}, older than {package.floor} ({package.why})"
        return Check(package.name, bad, found, install)
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {package.module}"],
            capture_output=True, text=True, timeout=_IMPORT_SECONDS, errors="replace", check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        found = f"{version}, its import takes more than {_IMPORT_SECONDS:.0f} s"
        return Check(package.name, bad, found, f"reinstall it: {install} --force-reinstall")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        found = f"{version}, cannot be imported: {last[:160]}"
        return Check(package.name, bad, found, f"reinstall it: {install} --force-reinstall")
    if package.below and _numbers(version) >= _numbers(package.below):
        found = f"{version}, newer than any that was tried (below {package.below})"
        return Check(package.name, WARN, found, f"{install[:-1]},<{package.below}'")
    return Check(package.name, OK, version)


def check_cpu_experts() -> Check:
    """Whether bfloat16 experts on a CPU have our own products; compiles them where they are new."""
    from phi_kernels import avx512_build

    name = "CPU experts"
    if reason := avx512_build.reason_against():
        return Check(name, OK, f"bfloat16 on oneDNN: {reason}")
    if error := avx512_build.load_error():
        found = f"bfloat16 on oneDNN, slower: {error[:160]}"
        return Check(name, WARN, found, avx512_build.remedy(error))
    return Check(name, OK, "bfloat16 on our own AVX-512 products")


def check_cores() -> Check:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{cores} of {os.cpu_count()} cores, {_processor_name()}"
    memory = _memory_gib()
    if memory is None:
        return Check("cores, memory", OK, f"{found}; memory not known on this system")
    found += f"; {memory:.1f} GiB of memory available"
    if memory < 2.0:
        return Check("cores, memory", WARN, found, "train a smaller model, e.g. experiment=nano")
    return Check("cores, memory", OK, found)


def check_neighbours() -> Check:
    """Whether other programs keep busy the cores that this process may use, over a second."""
    name = "other programs"
    before = _busy_seconds()
    began = time.monotonic()
    time.sleep(_NEIGHBOUR_SECONDS)
    busy = [after - of_core for of_core, after in zip(before, _busy_seconds(), strict=True)]
    if not busy:
        return Check(name, OK, "not known on this system")
    num_busy = sum(busy) / (time.monotonic() - began)
    if num_busy < 0.5:
        return Check(name, OK, f"{num_busy:.1f} of {len(busy)} cores are busy")
    return Check(
        name, WARN, f"cores are shared: other programs keep {num_busy:.1f} of {len(busy)} busy",
        "end them, or expect steps that take several times as long",
    )  # fmt: skip


def check_instructions() -> Check:
    """The instruction sets that decide how fast a CPU multiplies matrices."""
    names = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16",
             "amx_bf16": "AMX BF16"}  # fmt: skip
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.M)
    if not match:
        return Check("instruction sets", OK, "not known on this system")
    flags = match[1].split()
    found = [title for flag, title in names.items() if flag in flags]
    missing = [title for flag, title in names.items() if flag not in flags]
    text = f"{', '.join(found) or 'none'} (not: {', '.join(missing) or 'none'})"
    if platform.machine() in ("x86_64", "AMD64") and "avx2" not in flags:
        return Check("instruction sets", WARN, text, "expect slow training on this CPU")
    return Check("instruction sets", OK, text)


def check_torch_devices() -> list[Check]:
    """Measured matrix product rates of the CPU, and every CUDA device."""
    import torch

    from moe.train.throughput import measure_peak_flops

    rates = {
        dtype: measure_peak_flops(torch.device("cpu"), dtype, seconds=0.5) / 1e9
        for dtype in (torch.float32, torch.bfloat16)
    }
    found = (
        f"float32 {rates[torch.float32]:,.0f} GFLOP/s, bfloat16 {rates[torch.bfloat16]:,.0f} "
        f"GFLOP/s on {torch.get_num_threads()} thread(s)"
    )
    checks = [Check("CPU products", OK, found)]
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        return [*checks, Check("CUDA", OK, f"no device ({built} build of torch)")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(index))
        found = (
            f"{device.name}, compute capability {device.major}.{device.minor}, {free:.1f} of "
            f"{total:.1f} GiB free, CUDA {torch.version.cuda}"
        )
        is_old = (device.major, device.minor) < (8, 0)
        fix = "bfloat16 and grouped_mm need 8.0; use train.precision=float32" if is_old else ""
        checks.append(Check(f"CUDA {index}", WARN if is_old else OK, found, fix))
    return checks


def check_collectives() -> list[Check]:
    """Prove gloo by two processes that add numbers up, and NCCL on up to two devices."""
    import torch
    import torch.distributed as dist

    checks = [check_all_reduce("gloo", world_size=2)]
    if torch.cuda.is_available():
        if dist.is_nccl_available():
            world_size = min(2, torch.cuda.device_count())
            checks.append(check_all_reduce("nccl", world_size=world_size))
        else:
            checks.append(Check("nccl", FAIL, "not in this torch", "install a CUDA build of torch"))
    return checks


def check_all_reduce(backend: str, *, world_size: int, seconds: float = _RANKS_SECONDS) -> Check:
    """Start world_size processes on this machine that sum their rank + 1; none outlives the check.

    The network interface is the one that training would take (GLOO_SOCKET_IFNAME and the like).
    """
    fix = (
        f"set {backend.upper()}_SOCKET_IFNAME to a working interface (`ip addr`; lo on one "
        "machine), and let this user open sockets on 127.0.0.1"
    )
    script = Path(__file__).parent / "parallel" / "sum_of_ranks.py"
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-P", str(script), backend, str(rank), str(world_size), folder],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            )
            for rank in range(world_size)
        ]  # fmt: skip
        try:
            answers = [rank.communicate(timeout=seconds) for rank in ranks]
        except subprocess.TimeoutExpired:
            found = f"no answer in {seconds:.0f} s"
            return Check(backend, FAIL, f"all_reduce of {world_size} process(es): {found}", fix)
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
    wanted = str(world_size * (world_size + 1) // 2)
    for (said, complained), rank in zip(answers, ranks, strict=True):
        if rank.returncode != 0 or said.strip() != wanted:
            last = (complained.strip().splitlines() or [f"said {said.strip()!r}"])[-1]
            found = f"all_reduce of {world_size} process(es) failed: {last[:200]}"
            return Check(backend, FAIL, found, fix)
    return Check(backend, OK, f"all_reduce of {world_size} process(es) on this machine")


def check_folder(folder: Path) -> Check:
    """Write a file for real, and look at the space left."""
    fix = "go to a folder that you may write, or free space"
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        found = f"{folder}: cannot be written: {error.strerror or error}"
        return Check("working folder", FAIL, found, fix)
    found = f"{folder}: can be written, {free:,.1f} GiB free"
    if free < _NO_SPACE_GIB:
        return Check("working folder", FAIL, found, fix)
    if free < _LITTLE_SPACE_GIB:
        return Check("working folder", WARN, found, "free space; checkpoints of big models need it")
    return Check("working folder", OK, found)


def check_wandb() -> Check:
    """Mode and presence of a key; never the key."""
    mode = os.environ.get("WANDB_MODE", "")
    has_key = bool(os.environ.get("WANDB_API_KEY"))
    has_login = any(
        "wandb" in _read(str(Path(name).expanduser())) for name in ("~/.netrc", "~/_netrc")
    )
    where = "in WANDB_API_KEY" if has_key else "in netrc" if has_login else "none"
    found = f"mode {mode or 'by logging.wandb, offline unless set'}; API key: {where}"
    if mode == "online" and where == "none":
        return Check("W&B", WARN, found, "set WANDB_API_KEY or run `wandb login`, or stay offline")
    return Check("W&B", OK, found)


def table(checks: list[Check]) -> str:
    """The report for people: a line a check, and under a bad one what to do."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<5} {check.name:<{width}}  {check.found}")
        if check.fix:
            lines.append(f"{'':<5} {'':<{width}}  fix: {check.fix}")
    num_failed = sum(check.status == FAIL for check in checks)
    lines.append("")
    lines.append(f"{num_failed} check(s) failed" if num_failed else "ready to train")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> str:
    """The report for programs: {"ok": bool, "checks": [{"name", "status", "found", "fix"}]}."""
    rows = [vars(check) for check in checks]
    return json.dumps({"ok": all(c.status != FAIL for c in checks), "checks": rows}, indent=1)


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0); a pre-release counts as its release."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _processor_name() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.M)
    return match[1] if match else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    match = re.search(r"^MemAvailable:\s*(\d+) kB$", _read("/proc/meminfo"), re.M)
    return int(match[1]) / 2**20 if match else None


def _busy_seconds() -> list[float]:
    """Seconds of work since the machine's start of each core that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    lines = re.findall(r"^cpu(\d+) (.*)$", _read("/proc/stat"), re.M)
    ours = os.sched_getaffinity(0)
    ticks = [list(map(int, numbers.split())) for core, numbers in lines if int(core) in ours]
    # user, nice, system, idle, iowait, irq, softirq, steal: idle and iowait are no work
    return [(sum(t[:8]) - sum(t[3:5])) / os.sysconf("SC_CLK_TCK") for t in ticks]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
