"""A state file: one updater's numbers, little-endian, then a digest of each block of them.

Reading verifies every block that it touches, so a part of a large file is read for little more than its own bytes and
never unverified. The manifest holds the digest of the digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from types import TracebackType

from hethub.checkpoints.manifest import (
    BLOCK_DIGEST_BYTES,
    CheckpointError,
    Manifest,
    StateFileSpec,
    state_file_name,
    trailer_bytes,
)

__all__ = ["StateFile", "block_bytes_for", "write_state_file"]

_LEAST_BLOCK, _LARGEST_BLOCK = 1 << 12, 1 << 20
_BLOCKS = 4096  # about so many a file: few enough to list, small enough to read parts


def block_bytes_for(data_bytes: int) -> int:
    """The block size of a file: a power of two, 4 KiB to 1 MiB."""
    wanted = max(1, data_bytes // _BLOCKS)
    return min(_LARGEST_BLOCK, max(_LEAST_BLOCK, 1 << (wanted - 1).bit_length()))


def _digest(block: bytes | memoryview) -> bytes:
    return hashlib.blake2b(block, digest_size=BLOCK_DIGEST_BYTES).digest()


def write_state_file(path: Path, data: memoryview, block_bytes: int) -> str:
    """Write `data` (bytes) and its digests to a new file and sync it; returns the digest of the digests.

    Raises OSError, with no file left: disk full, not writable, or there already.
    """
    trailer = b"".join(_digest(data[at : at + block_bytes]) for at in range(0, len(data), block_bytes))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        try:
            for part in (data, memoryview(trailer)):
                at = 0
                while at < len(part):
                    at += os.write(descriptor, part[at:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return hashlib.blake2b(trailer, digest_size=32).hexdigest()


class StateFile:
    """An open state file. `bytes_read` counts what came from the disk."""

    def __init__(self, folder: Path, manifest: Manifest, spec: StateFileSpec) -> None:
        """Raises CheckpointError where the file is not the one that the manifest means."""
        self.path = folder / state_file_name(spec.device)
        self.data_bytes = manifest.data_bytes(spec)
        self._block_bytes = spec.block_bytes
        try:
            # No links: they may lead out of the folder.
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise self._wrong(f"cannot be opened ({error.strerror})") from None
        try:
            size = os.fstat(self._descriptor).st_size
            if size != spec.bytes:
                raise self._wrong(f"has {size} bytes, not {spec.bytes}")
            self._trailer = self._pread(self.data_bytes, trailer_bytes(self.data_bytes, spec.block_bytes))
            if hashlib.blake2b(self._trailer, digest_size=32).hexdigest() != spec.digest:
                raise self._wrong("is not the one that the manifest names, or its digests are damaged")
        except BaseException:
            os.close(self._descriptor)
            raise
        self.bytes_read = len(self._trailer)
        self._last: tuple[int, bytes] = (
            -1,
            b"",
        )  # a range often begins in the block where the one before ended

    def __enter__(self) -> StateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the data. Raises CheckpointError where a block is damaged."""
        if not 0 <= start < stop <= self.data_bytes:
            raise ValueError(f"[{start}, {stop}) is not in {self.data_bytes} bytes")
        size = self._block_bytes
        first, last = start // size, (stop - 1) // size
        blocks = []
        if first == self._last[0]:
            blocks.append(self._last[1])
        begin = first + len(blocks)
        if begin <= last:
            found = self._pread(begin * size, min((last + 1) * size, self.data_bytes) - begin * size)
            self.bytes_read += len(found)
            for number in range(begin, last + 1):
                block = found[(number - begin) * size : (number - begin + 1) * size]
                at = number * BLOCK_DIGEST_BYTES
                if _digest(block) != self._trailer[at : at + BLOCK_DIGEST_BYTES]:
                    raise self._wrong(
                        f"is damaged between bytes {number * size} and {number * size + len(block)}"
                    )
                self._last = (number, block)
            blocks.append(found)
        return b"".join(blocks)[start - first * size : stop - first * size]

    def verify(self) -> None:
        """Read everything. Raises CheckpointError where a block is damaged."""
        size = self._block_bytes * max(1, _LARGEST_BLOCK // self._block_bytes)
        for start in range(0, self.data_bytes, size):
            self.read(start, min(start + size, self.data_bytes))

    def _pread(self, at: int, size: int) -> bytes:
        found = b""
        while len(found) < size:
            try:
                more = os.pread(self._descriptor, size - len(found), at + len(found))
            except OSError as error:
                raise self._wrong(f"cannot be read ({error.strerror})") from None
            if not more:
                raise self._wrong("ends before its time")
            found += more
        return found

    def _wrong(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}.")
