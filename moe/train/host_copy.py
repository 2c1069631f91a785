"""Copies of tensors in host memory, made at once, that are written while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe.train.tensor_file import TensorToWrite

# a power of two: the allocator of pinned memory rounds a block up to the next one
_BLOCK_BYTES = 64 * 2**20


class HostCopies:
    """Copies a rank's tensors; pinned memory is kept and used again by the next save."""

    def __init__(self) -> None:
        self._blocks: list[torch.Tensor] = []

    def copy(
        self, tensors: Mapping[str, Mapping[str, TensorToWrite]]
    ) -> dict[str, dict[str, TensorToWrite]]:
        """The same tensors in host memory. Those of the copy before are overwritten.

        Tensors on a GPU go into pinned memory, which the GPU fills at the full speed of the bus;
        their stream is waited for once, at the end.
        """
        place = 0  # in the blocks together
        devices = set()
        copied: dict[str, dict[str, TensorToWrite]] = {}
        for stem, table in tensors.items():
            copied[stem] = {}
            for key, (record, values) in table.items():
                parts: list[torch.Tensor] = []
                for value in values:
                    plain = value.detach().resolve_conj().resolve_neg()
                    if value.is_cuda:
                        devices.add(value.device)
                        raw = plain.contiguous().view(-1).view(torch.uint8)
                        parts += self._into_blocks(raw, place)
                        place += len(raw)
                    else:
                        parts.append(plain.clone(memory_format=torch.contiguous_format))
                copied[stem][key] = TensorToWrite(record, tuple(parts))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return copied

    def _into_blocks(self, raw: torch.Tensor, place: int) -> list[torch.Tensor]:
        """Start to copy bytes to a place in the blocks; the parts of blocks that will hold them."""
        parts = []
        while len(raw):
            number, offset = divmod(place, _BLOCK_BYTES)
            if number == len(self._blocks):
                self._blocks.append(_new_block(_BLOCK_BYTES))
            part = self._blocks[number][offset : offset + len(raw)]
            part.copy_(raw[: len(part)], non_blocking=True)
            parts.append(part)
            raw, place = raw[len(part) :], place + len(part)
        return parts


def _new_block(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
