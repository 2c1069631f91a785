"""Which experts the tokens of a measurement go to: uniform, Zipf, recorded, all to one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NAMES = ("uniform", "zipf", "recorded", "all_to_one")
BUNDLED = Path(__file__).with_name("recorded_routing.npy")


class NotRecorded(Exception):
    """There is no recorded routing of this size; the text says why."""


def make_routing(
    name: str, *, num_tokens: int, num_experts: int, top_k: int, recorded: Path | None = None
) -> Tensor:
    """Return expert_TK (int64, CPU). uniform and zipf: distinct experts, drawn with a fixed seed.

    zipf: expert e is drawn in proportion to 1 / (1 + e). all_to_one: both slots of every token on
    expert 0, the worst case for a plan. recorded: what a trained model chose for held-out text
    (record_routing.py); NotRecorded where the file has too few tokens or other experts.
    """
    if name == "all_to_one":
        return torch.zeros(num_tokens, top_k, dtype=torch.int64)
    if name == "recorded":
        return _recorded(recorded or BUNDLED, num_tokens, num_experts, top_k)
    generator = torch.Generator().manual_seed(0)
    rank_E = torch.arange(1, num_experts + 1, dtype=torch.float32)
    uniform_TE = torch.rand(num_tokens, num_experts, generator=generator).clamp(min=1e-20)
    # Gumbel-top-k: a draw without replacement in proportion to the exponential of the logits
    logit_E = -rank_E.log() if name == "zipf" else torch.zeros(num_experts)
    return (logit_E - (-uniform_TE.log()).log()).topk(top_k, dim=1).indices


def _recorded(file: Path, num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    if not file.exists():
        raise NotRecorded(f"no file {file.name}")
    loaded = np.load(file, allow_pickle=False)
    expert_TK = loaded[loaded.files[0]] if file.suffix == ".npz" else loaded
    if expert_TK.ndim != 2 or expert_TK.shape[0] < num_tokens or expert_TK.shape[1] != top_k:
        raise NotRecorded(f"{file.name} has {expert_TK.shape}, wanted ({num_tokens}, {top_k})")
    if int(expert_TK.max()) >= num_experts:
        raise NotRecorded(f"{file.name} names expert {expert_TK.max()} of {num_experts}")
    return torch.from_numpy(expert_TK[:num_tokens].astype(np.int64))


def fullest_share(expert_TK: Tensor) -> float:
    """The share of all slots that the expert with the most has; 1 / E when even."""
    return expert_TK.flatten().bincount().max().item() / expert_TK.numel()
