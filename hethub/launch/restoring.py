"""A worker's part of going on: it reads what its place in the plan needs, and uses nothing before all is verified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hethub.checkpoints.manifest import MANIFEST, CheckpointError, Manifest, read_manifest
from hethub.checkpoints.reshard import Reader, needs, stored_parameters_differ
from hethub.cost.shapes import Parameter
from hethub.launch.optimizer import Updater
from hethub.program.actions import Program
from hethub.specs.layout import Span

__all__ = ["Restored"]


class Restored:
    """A device's share of a checkpoint, in host memory, every byte verified.

    `bytes_read` came from the disk, `bytes_needed` are those of the numbers it needs.
    """

    def __init__(self, folder: Path, program: Program, device: int) -> None:
        """Raises CheckpointError: damaged, absent, of another model."""
        self.manifest: Manifest = read_manifest(folder / MANIFEST)
        if stored_parameters_differ(self.manifest, program.ownership.parameters):
            raise CheckpointError(f"{folder}: its parameters are those of another model.")
        wanted = needs(program, device)
        self._masters: dict[str, tuple[int, Tensor]] = {}  # first index, all that this device holds
        self._moments: dict[tuple[int, int, int], Tensor] = {}  # kind, parameter, start
        with Reader(folder, self.manifest) as reader:
            for need in wanted:
                numbers = torch.from_numpy(
                    np.array(reader.read(need))
                )  # a copy: what was read cannot be written to
                if need.kind == 0:
                    name = program.ownership.parameters[need.parameter].name
                    self._masters[name] = (need.start, numbers)
                else:
                    self._moments[need.kind, need.parameter, need.start] = numbers
            self.bytes_read, self.bytes_needed = reader.bytes_read, reader.needed_bytes(wanted)

    def weights(self, parameter: Parameter, span: Span) -> Tensor:
        """A weight source of stages: masters [start, stop) of the cut axis, wide."""
        first, numbers = self._masters[parameter.name]
        return numbers.narrow(parameter.axis, span[0] - first, span[1] - span[0])

    @torch.no_grad()
    def fill(self, updater: Updater) -> None:
        """Give an updater its masters, moments and count of updates."""
        table = updater.shards.ownership
        for bucket, optimizer in zip(updater.buckets, updater.optimizers, strict=True):
            for number in bucket:
                entry = table.slices[number]
                master = updater.masters[number]
                master.copy_(self.weights(table.parameters[entry.parameter], (entry.start, entry.stop)))
                for kind, moments in ((1, optimizer.first_moments), (2, optimizer.second_moments)):
                    moments[master].copy_(self._moments[kind, entry.parameter, entry.start])
        updater.resume(self.manifest.updates)
