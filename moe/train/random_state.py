"""Every global random generator's state as JSON, so that a resumed run draws the same numbers.

Covered: Python's `random`, numpy's global generator, torch's CPU generator and that of the CUDA
device in use; a run may go on with another number of devices. A generator made by hand
(`torch.Generator`) is saved by whoever made it.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch

from moe.errors import CheckpointError

_NUMPY_WORDS = 624  # length of the Mersenne Twister's state


def capture_random_state() -> dict[str, Any]:
    """Plain JSON values of all generators; reading them changes none."""
    version, words, next_gauss = random.getstate()
    numpy_state = _plain_numpy_state()
    return {
        "python": {"version": version, "words": list(words), "next_gauss": next_gauss},
        "numpy": numpy_state,
        "torch_cpu": _hex(torch.get_rng_state()),
        "torch_cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every generator as it was captured; each continues bitwise.

    CUDA's is left alone where the state was captured without one, or there is none here. Raises
    CheckpointError where the content is wrong; all generators are then as they were before.
    """
    before = capture_random_state()
    try:
        _apply(state)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        _apply(before)
        reason = f"key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"random state: {reason}. It must be what capture_random_state returned; resume from "
            "another checkpoint."
        ) from error


def _apply(state: dict[str, Any]) -> None:
    if not isinstance(state, dict):
        raise TypeError(f"got {type(state).__name__}, not an object")
    cuda = state["torch_cuda"]
    if isinstance(cuda, list):  # of every device, as it was captured before 2026-11
        cuda = cuda[0] if cuda else None
    if cuda is not None and not isinstance(cuda, str):
        raise TypeError(f"torch_cuda is {type(cuda).__name__}, not text")
    python = state["python"]
    # Python would translate version 2, which is not what was captured
    if python["version"] != random.getstate()[0]:
        raise ValueError(f"python.version is {python['version']!r}")
    random.setstate((python["version"], tuple(python["words"]), python["next_gauss"]))
    _set_numpy_state(state["numpy"])
    torch.set_rng_state(_from_hex(state["torch_cpu"]))
    if cuda is not None:
        generator = _from_hex(cuda)
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(generator)


def _plain_numpy_state() -> dict[str, Any]:
    state: dict[str, Any] = numpy.random.get_state(legacy=False)  # type: ignore[assignment]
    return {
        "generator": state["bit_generator"],
        "words": state["state"]["key"].tolist(),
        "position": int(state["state"]["pos"]),
        "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }


def _set_numpy_state(state: dict[str, Any]) -> None:
    words = numpy.array(state["words"], dtype=numpy.uint32)
    # numpy does not check these itself: a position outside reads memory that is not the state
    if words.shape != (_NUMPY_WORDS,) or not 0 <= state["position"] <= _NUMPY_WORDS:
        raise ValueError("numpy's words or position have the wrong size")
    numpy.random.set_state(
        {
            "bit_generator": state["generator"],
            "state": {"key": words, "pos": state["position"]},
            "has_gauss": state["has_gauss"],
            "gauss": state["gauss"],
        }
    )


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
