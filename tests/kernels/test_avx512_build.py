"""The library is compiled once for all processes, and where it cannot be made, that is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from phi_kernels import avx512_build

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "flags\t\t: fpu fma bmi2 avx512f avx512bw avx512dq avx512vl avx512_bf16"
# two tokens through the experts, and which products they took
RUN = """
import torch
from phi_kernels import avx512_experts, cpu_expert_mlp, make_plan
plan = make_plan(torch.tensor([[0, 1], [1, 0]]), num_experts=2)
x, gate_up, down = (torch.ones(s, dtype=torch.bfloat16) for s in ((2, 4), (2, 8, 4), (2, 4, 4)))
y = cpu_expert_mlp(x, torch.ones(2, 2), plan, gate_up, down)
print("own" if avx512_experts.takes(x, gate_up, down) else "torch", y[0, 0].item())
"""
needs_the_machine = pytest.mark.skipif(
    bool(avx512_build.reason_against()), reason="a processor that would not use the library"
)


def start(cache: Path, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(cache), "PYTHONPATH": str(ROOT / "kernels"), **variables
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", RUN], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def result(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out.strip(), err


@needs_the_machine
@pytest.mark.slow
def test_one_process_compiles_and_one_that_was_killed_stops_nobody(tmp_path):
    killed = start(tmp_path)
    folder = tmp_path / "phi_kernels"
    deadline = time.monotonic() + 120
    while not list(folder.glob("tmp*/")):  # it compiles into a folder of its own
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not list(folder.glob("*.so"))
    made = [result(process) for process in [start(tmp_path), start(tmp_path)]]
    assert [out.split()[0] for out, _ in made] == ["own", "own"]
    assert len({out for out, _ in made}) == 1
    assert sum("compiling" in err for _, err in made) == 1
    assert len(list(folder.glob("*.so"))) == 1
    assert "compiling" not in result(start(tmp_path))[1]


@needs_the_machine
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler was not found"),
        ({"CXX": "false"}, "returned non-zero exit status 1"),
        ({"PHI_KERNELS_AVX512": "0"}, ""),
    ],
    ids=["no compiler", "a compiler that fails", "switched off"],
)
def test_without_the_library_torchs_products_answer_and_the_reason_is_said(
    tmp_path, variables, said
):
    out, err = result(start(tmp_path, **variables))
    assert out.startswith("torch")
    assert err.count("phi_kernels: bfloat16 experts run on oneDNN") == bool(said)
    assert said in err
    assert not list(tmp_path.rglob("*.so"))


@needs_the_machine
def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "phi_kernels").write_text("a file where the folder belongs")
    out, err = result(start(tmp_path))
    assert out.startswith("torch")
    assert "phi_kernels: bfloat16 experts run on oneDNN, slower: " in err


@pytest.mark.parametrize(
    ("cpu_info", "switch", "reason"),
    [
        (FLAGS, "1", ""),
        (FLAGS, "0", "PHI_KERNELS_AVX512=0"),
        (FLAGS.replace(" avx512_bf16", ""), "1", "the processor has no avx512_bf16"),
        (f"{FLAGS} amx_bf16", "1", "the processor has amx_bf16, which oneDNN uses"),
        ("Features : asimd bf16", "1", "the processor has no "),
    ],
    ids=["AVX-512 BF16", "switched off", "AVX-512 alone", "AMX", "Arm"],
)
def test_the_reason_against_is_read_from_the_processor(
    tmp_path, monkeypatch, cpu_info, switch, reason
):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{cpu_info}\n")
    monkeypatch.setattr(avx512_build, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setenv(avx512_build.SWITCH, switch)
    found = avx512_build.reason_against.__wrapped__()
    assert found.startswith(reason) if reason else found == ""


def test_a_folder_that_cannot_be_written_is_not_blamed_on_the_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/proc/nowhere")  # not even root writes there
    message = avx512_build.load_error.__wrapped__()
    assert avx512_build.remedy(message) == "set TORCH_EXTENSIONS_DIR to a folder that you may write"
    assert "compiler" not in capsys.readouterr().err
