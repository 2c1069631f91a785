"""How the weights of a dense model start a sparse one: every expert is a copy of the dense block.

Source: Komatsuzaki et al. 2022, "Sparse Upcycling" (arXiv 2212.05055): attention, norms, embeddings
and head are those of the dense model, each expert begins as its layer's feed-forward block, and the
router is new. All experts being equal, a block's output is the dense block's times the sum of the
chosen weights: the same model where these are divided by their sum (router=topk
router.renormalise=true), another scale with SparseMixer-v2 and with plain top-k.

Whether Phi-3.5-MoE was made so is not published. Its name "16x3.8B" suggests 16 copies of the 3.8 B
mini; its experts' width, 6400 against mini's 8192, speaks against a plain copy, as do its 4096
numbers a token against 3072 and its LayerNorm against RMSNorm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe.config import TrainConfig
from moe.errors import CheckpointError
from moe.load_run import OpenedRun
from moe.parallel.pieces import ReadRange
from moe.train.state import parameter_shapes, require_parameters

_KEY = "train.upcycle"
# what makes a sparse model of a dense one
_MAY_DIFFER = ("num_experts", "top_k")
_EXPERTS, _ROUTER = ".experts.", ".router."


def require_dense_parent(
    opened: OpenedRun, config: TrainConfig, *, differences: dict[str, str]
) -> None:
    """Raise CheckpointError where the opened model cannot start the configured one's experts.

    differences: a sentence for each key of ModelConfig whose value differs. Only the number of
    experts and how many are chosen may; the router's settings are no part of it.
    """
    folder = opened.checkpoint.folder
    if opened.config.model.is_sparse:
        raise CheckpointError(
            f"{_KEY}: got true, but the model in {folder} (train.init_from) has "
            f"{opened.config.model.num_experts} experts already; allowed: a dense model. Set "
            f"{_KEY}=false to start from its experts as they are."
        )
    odd = [sentence for key, sentence in differences.items() if key not in _MAY_DIFFER]
    if odd:
        raise CheckpointError(
            f"{_KEY}: {folder} is the dense form of another model: {'; '.join(odd)}. Only "
            "model.num_experts, model.top_k and router may differ. Set these keys to what it has, "
            "or train a dense model that has what this run asks for."
        )
    require_parameters(opened.checkpoint, parameter_shapes(opened.config))


def reader_of_copies(read: ReadRange, shapes: dict[str, tuple[int, ...]]) -> ReadRange:
    """How the parameters of a sparse model are read from its dense parent, in any range of them.

    read: reads the dense model. shapes: of the sparse model's parameters, by name. A range of
    stacked experts is read once, as long as one expert, and repeated in place: no memory beside
    what is filled. A router's weight is left as it was started.
    """

    def read_copied(stem: str, name: str, start: int, into: Tensor) -> None:
        if _ROUTER in name:
            return
        if _EXPERTS not in name:
            read(stem, name, start, into)
            return
        length = math.prod(shapes[name][1:])  # of one expert
        _read_repeated(read, stem, _dense_name(name), start % length, into.view(-1), length=length)

    return read_copied


def _dense_name(name: str) -> str:
    """blocks.0.feed_forward.experts.down -> blocks.0.feed_forward.down.weight."""
    return f"{name.replace(_EXPERTS, '.')}.weight"


@torch.no_grad()
def _read_repeated(
    read: ReadRange, stem: str, name: str, start: int, into: Tensor, *, length: int
) -> None:
    """Fill `into` with a tensor of `length` elements said over and over, from element start on."""
    to_end = min(length - start, len(into))
    read(stem, name, start, into[:to_end])
    once = min(length, len(into))
    if once > to_end:
        read(stem, name, 0, into[to_end:once])
    for first in range(length, len(into), length):
        repeated = into[first : first + length]
        repeated.copy_(into[: len(repeated)])


def what_was_copied(config: TrainConfig) -> str:
    """One line for the user; it follows "weights: from ..."."""
    model, router = config.model, config.router
    scale = ""
    if router.name != "topk" or not router.renormalise:
        scale = (
            "; a block begins as the dense one times the sum of its router weights "
            "(exactly as the dense one only with router=topk router.renormalise=true)"
        )
    return (
        f"upcycled: {model.num_experts} experts in each of {model.num_layers} layers are copies of "
        "its feed-forward block; attention, norms, embeddings and head are copied; the routers "
        f"start anew from seed {config.seed}{scale}"
    )
