"""What compute-sanitizer watches: forward and backward of the layer at small edges, then exit.

usage: compute-sanitizer --error-exitcode 9 python tests/gpu/sanitized_run.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels"), str(ROOT), str(ROOT / "kernels")]

import phi_kernels  # noqa: E402 the path comes first
from expert_cases import CASES, answers, make_inputs  # noqa: E402
from layer_on_device import DEVICE, HALF, expert_mlp  # noqa: E402

# a partial tile in every direction, an empty expert, one row
NAMES = ("one token", "first and last expert empty", "widths that no tile divides")


def main() -> None:
    """Print one line a case; every answer is read, so that every kernel has run."""
    for name in NAMES:
        inputs = make_inputs(CASES[name], HALF, device=DEVICE)
        num_experts = CASES[name].num_experts
        logit_TE = torch.randn(len(inputs.x_TD), num_experts, device=DEVICE, requires_grad=True)
        weight_TK, expert_TK, _ = phi_kernels.sparsemixer(logit_TE, threshold=0.1)
        weight_TK.sum().backward()
        phi_kernels.make_plan(expert_TK, num_experts=num_experts)
        total = sum(value.double().sum().item() for value in answers(expert_mlp, inputs).values())
        print(f"{name}: {total:.6g}", flush=True)


if __name__ == "__main__":
    main()
