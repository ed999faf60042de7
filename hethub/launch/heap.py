"""Memory for what lasts: private, or on a heap that other processes of the host can map."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["NONCE_BYTES", "Allocate", "Heap", "in_private"]

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]
NONCE_BYTES = 16


def in_private(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that only this process sees."""
    return torch.zeros(elements, dtype=dtype, device=device)


class Heap:
    """An anonymous file in memory (Linux: memfd_create). It begins with a nonce by which a reader knows it."""

    def __init__(self) -> None:
        """Raises OSError where the system has none."""
        if not hasattr(os, "memfd_create"):
            raise OSError("no anonymous files in memory")
        self.file = os.memfd_create("hethub")
        self.nonce = os.urandom(NONCE_BYTES)
        os.write(self.file, self.nonce)
        self._size = mmap.PAGESIZE
        self._blocks: list[tuple[int, int, int]] = []  # address, bytes, offset in the file

    def allocate(self, elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Zeros (elements,) on the heap. They live as long as tensors look at them, whatever becomes of the heap."""
        assert device.type == "cpu"
        if elements == 0:
            return torch.zeros(0, dtype=dtype)
        size = elements * dtype.itemsize
        offset, self._size = self._size, self._size + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self.file, self._size)
        tensor = torch.frombuffer(mmap.mmap(self.file, size, offset=offset), dtype=dtype)
        self._blocks.append((tensor.data_ptr(), size, offset))
        return tensor

    def offset(self, tensor: Tensor) -> int | None:
        """Where in the file a contiguous tensor begins; None where it is not on the heap."""
        for address, size, offset in self._blocks:
            if address <= tensor.data_ptr() < address + size and tensor.is_contiguous():
                return offset + tensor.data_ptr() - address
        return None

    def close(self) -> None:
        """Let nobody else map it from now on."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def __del__(self) -> None:
        self.close()
