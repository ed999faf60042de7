"""A worker's part of a checkpoint: a host copy of what it updates, written beside the training.

Training stands still for the copy only. One thread writes; where it is not done by the next checkpoint, that one is
given up, on this device and so by the driver for all.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hethub.checkpoints.manifest import state_file_name
from hethub.checkpoints.state_file import block_bytes_for, write_state_file
from hethub.checkpoints.store import Store
from hethub.launch.optimizer import Updater

__all__ = ["CheckpointSettings", "Saved", "Saver"]

_KEPT_REPORTS = 8  # the driver looks several times a second


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSettings:
    """After which steps to save, and where: `folder` is the run's `checkpoints`."""

    folder: Path
    attempt: int
    every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A device's report of its file of one checkpoint; `problem` says why there is none. Seconds are wall seconds:
    how long training stood still, and how long copy, digests, writing and syncing took together."""

    step: int
    bytes: int
    block_bytes: int
    digest: str
    updates: int
    stall_seconds: float
    seconds: float
    problem: str = ""


class Saver:
    """Copies and writes one device's state. Use from the training thread; `reports` may be asked by any."""

    def __init__(self, settings: CheckpointSettings, device: str, updater: Updater) -> None:
        """`device` is group/node/device; what is saved is what `updater` updates, in the order of the table."""
        self._settings = settings
        self._store = Store(settings.folder)
        self._name = state_file_name(device)
        self._updater = updater
        self._reports: list[Saved] = []
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._sources = _state_tensors(updater)
        # Made once: to touch new memory takes longer than to copy.
        dtype = self._sources[0].dtype if self._sources else torch.float32
        self._copy = torch.empty(sum(t.numel() for t in self._sources), dtype=dtype)
        sizes = [t.numel() for t in self._sources]
        self._places = [
            place.view(t.shape) for place, t in zip(self._copy.split(sizes), self._sources, strict=True)
        ]

    def due(self, steps: int) -> bool:
        """Whether to save after so many steps."""
        return steps % self._settings.every == 0

    @torch.no_grad()
    def save(self, steps: int) -> None:
        """Copy the state after `steps` steps and let it be written."""
        begin = time.monotonic()
        if self._writing is not None and not self._writing.done():
            self._report(steps, begin, problem="the checkpoint before it is still being written")
            return
        if self._sources:
            torch._foreach_copy_(self._places, self._sources)
        stall = time.monotonic() - begin
        self._writing = self._thread.submit(self._write, steps, self._updater.updates, begin, stall)

    def _write(self, steps: int, updates: int, begin: float, stall: float) -> None:
        folder = self._store.partial(steps, self._settings.attempt)
        data = memoryview(self._copy.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy has no Buffer
        block = block_bytes_for(len(data))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            digest = write_state_file(folder / self._name, data, block)
            size = (folder / self._name).stat().st_size
        except OSError as error:
            self._report(
                steps, begin, stall=stall, problem=f"{folder / self._name}: {error.strerror or error}"
            )
            return
        self._report(steps, begin, stall=stall, bytes=size, block_bytes=block, digest=digest, updates=updates)

    def _report(
        self,
        steps: int,
        begin: float,
        *,
        stall: float = 0.0,
        bytes: int = 0,
        block_bytes: int = 0,
        digest: str = "",
        updates: int = 0,
        problem: str = "",
    ) -> None:
        report = Saved(
            step=steps,
            bytes=bytes,
            block_bytes=block_bytes,
            digest=digest,
            updates=updates,
            stall_seconds=stall,
            seconds=time.monotonic() - begin,
            problem=problem,
        )
        self._reports = [*self._reports[1 - _KEPT_REPORTS :], report]

    def reports(self) -> Sequence[Saved]:
        """The newest reports, oldest first; the same ones may come again."""
        return self._reports

    def wait(self) -> Sequence[Saved]:
        """Wait until nothing is being written; the newest reports."""
        if self._writing is not None:
            self._writing.result()
        return self._reports

    def close(self) -> None:
        """End the thread, when it has written what it writes."""
        self._thread.shutdown()


def _state_tensors(updater: Updater) -> list[Tensor]:
    """What is kept of each owned slice, kind by kind in the order of the file, the cut axis outermost."""
    table = updater.shards.ownership
    moments = {
        number: (optimizer.first_moments[master], optimizer.second_moments[master])
        for bucket, optimizer in zip(updater.buckets, updater.optimizers, strict=True)
        for number in bucket
        for master in (updater.masters[number],)
    }
    found = []
    for kind in range(3):
        for number in sorted(updater.owned):
            tensor = updater.masters[number] if kind == 0 else moments[number][kind - 1]
            axis = table.parameters[table.slices[number].parameter].axis
            found.append(tensor.detach().movedim(axis, 0))
    return found
