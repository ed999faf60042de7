"""Resharding: what a device of any plan reads of a checkpoint that any other plan wrote.

The ownership table of the new plan says what a device needs: the weights of all that it holds, the moments of all that
it updates. The manifest says which file has which slice. The two cuts have nothing to do with each other; what is read
is their intersection.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hethub.checkpoints.manifest import KINDS, CheckpointError, Manifest
from hethub.checkpoints.state_file import StateFile
from hethub.cost.shapes import Parameter, parameter_span
from hethub.program.actions import Program
from hethub.specs.layout import Span

__all__ = ["Need", "Reader", "needs", "stored_parameters_differ"]

_DTYPES: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp64": np.dtype("<f8")}


class Need(NamedTuple):
    """Indices [start, stop) of the cut axis of a parameter (by its place in the table), of one of `KINDS`."""

    kind: int
    parameter: int
    start: int
    stop: int


def needs(program: Program, device: int) -> list[Need]:
    """What a device reads to go on: masters of what it holds, moments of what it updates; each element once."""
    found: dict[int, Span] = {}
    table = program.ownership
    for pipeline in program.layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                for rank in replica.ranks:
                    if rank.device != device:
                        continue
                    for number, parameter in enumerate(table.parameters):
                        if any(stage.layers[0] <= layer < stage.layers[1] for layer in parameter.layers):
                            found.setdefault(number, parameter_span(parameter, rank.share))
    held = [Need(0, number, *span) for number, span in sorted(found.items()) if span[0] < span[1]]
    owned = [table.slices[n] for n in table.by_updater.get(device, ())]
    moments = [Need(kind, s.parameter, s.start, s.stop) for kind in (1, 2) for s in owned]
    return held + moments


def stored_parameters_differ(manifest: Manifest, parameters: tuple[Parameter, ...]) -> bool:
    """Whether a checkpoint's parameters are others than a program's."""
    stored = [(p.name, p.shape, p.axis) for p in manifest.parameters]
    return stored != [(p.name, p.shape, p.axis) for p in parameters]


class _Place(NamedTuple):
    """Where a stored slice lies: its file, its first byte of the first kind, and the bytes between two kinds."""

    start: int
    stop: int
    file: int
    offset: int
    stride: int


class Reader:
    """Reads parts of parameters from a checkpoint's folder, opening only the files that have some of them."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder = folder
        self._manifest = manifest
        self._open: dict[int, StateFile] = {}
        self._stack = ExitStack()
        self._places: dict[int, list[_Place]] = defaultdict(list)
        for number, file in enumerate(manifest.files):
            stride = manifest.data_bytes(file) // len(KINDS)
            at = 0
            for piece in file.slices:
                self._places[piece[0]].append(_Place(piece[1], piece[2], number, at, stride))
                at += manifest.piece_bytes(piece)
        for places in self._places.values():
            places.sort()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk so far."""
        return sum(file.bytes_read for file in self._open.values())

    def _file(self, number: int) -> StateFile:
        if number not in self._open:
            spec = self._manifest.files[number]
            self._open[number] = self._stack.enter_context(StateFile(self._folder, self._manifest, spec))
        return self._open[number]

    def read(self, need: Need) -> npt.NDArray[np.floating]:
        """The numbers, axes in the parameter's own order. Raises CheckpointError where a byte is not as written."""
        parameter = self._manifest.parameters[need.parameter]
        if not 0 <= need.start < need.stop <= parameter.shape[parameter.axis]:
            raise CheckpointError(
                f"{self._folder}: {parameter.name} has no indices [{need.start}, {need.stop})."
            )
        each = parameter.elements_per_index * self._manifest.item_bytes
        pieces = []
        for place in self._places[need.parameter]:
            start, stop = max(place.start, need.start), min(place.stop, need.stop)
            if start < stop:
                at = place.offset + need.kind * place.stride + (start - place.start) * each
                pieces.append(self._file(place.file).read(at, at + (stop - start) * each))
        flat: npt.NDArray[Any] = np.frombuffer(b"".join(pieces), dtype=_DTYPES[self._manifest.dtype])
        if len(parameter.shape) == 1:
            return flat
        whole = flat.reshape(need.stop - need.start, -1)
        return whole if parameter.axis == 0 else whole.T

    def needed_bytes(self, wanted: list[Need]) -> int:
        """Bytes of all that is wanted."""
        parameters = self._manifest.parameters
        return (
            sum((need.stop - need.start) * parameters[need.parameter].elements_per_index for need in wanted)
            * self._manifest.item_bytes
        )
