"""The manifest of a checkpoint: what was trained, how far, and which file holds which slice of which parameter.

    hethub-checkpoint 1 BLAKE2B-OF-THE-REST
    {"version": 1, "step": ..., "files": [...]}            one line of JSON

It is written last, so a folder without one is no checkpoint. Every byte of a checkpoint hangs on the digest in the
first line: the manifest holds the digest of each file's block digests (`state_file`). Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from hethub.errors import InputError
from hethub.specs.base import Spec
from hethub.specs.document import parse_document
from hethub.specs.workload import Model, WorkloadSpec, resolve_workload

__all__ = [
    "ITEM_BYTES",
    "KINDS",
    "MANIFEST",
    "CheckpointError",
    "Manifest",
    "Piece",
    "StateFileSpec",
    "StoredParameter",
    "TrainingSpec",
    "encode_manifest",
    "read_manifest",
    "state_file_name",
]

MANIFEST = "manifest"
KINDS = ("master", "first_moment", "second_moment")
"""What is kept of every element, in the order of a file: the wide weight and AdamW's two moments. A 16-bit weight is
its master rounded, so it is not kept."""

ITEM_BYTES = {"fp32": 4, "fp64": 8}
_FIRST_LINE = re.compile(rb"hethub-checkpoint 1 ([0-9a-f]{64})\n")
_MAX_BYTES = 1 << 30
_HEX = "^[0-9a-f]{64}$"
_DEVICE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[0-9]{1,7}/[0-9]{1,7}$"

Piece = tuple[int, int, int]
"""(parameter, start, stop): indices [start, stop) of the cut axis of a parameter of the manifest's list."""


class CheckpointError(InputError):
    """A checkpoint is damaged, incomplete or of another training; nothing of it was used."""


class StoredParameter(Spec):
    """A parameter; slices are cut along `axis` and stored with it outermost, so that any part of one is consecutive."""

    name: str = Field(description="Hugging Face's name.")
    shape: tuple[int, ...] = Field(min_length=1, max_length=2, description="Elements by axis.")
    axis: int = Field(ge=0, le=1, description="The cut axis.")

    @property
    def elements_per_index(self) -> int:
        """Elements behind one index of the cut axis."""
        return math.prod(self.shape) // self.shape[self.axis]


class StateFileSpec(Spec):
    """One updater's file: for each of `KINDS` all its slices in order, then the digests of its blocks."""

    device: str = Field(pattern=_DEVICE, description="The device that updated these slices.")
    bytes: int = Field(ge=0, description="Bytes of the whole file.")
    block_bytes: int = Field(ge=512, le=1 << 24, description="Bytes of a block, the unit of a digest.")
    digest: str = Field(pattern=_HEX, description="BLAKE2b of the digests at the file's end.")
    slices: tuple[Piece, ...] = Field(description="(parameter, start, stop), in the order of the file.")


class TrainingSpec(Spec):
    """What makes the training: with these equal, any plan goes on with the same samples in the same order."""

    seed: int = Field(ge=0, description="Of initial weights and of the order of samples.")
    steps: int = Field(ge=1, description="Steps of the whole run: the learning rate follows from them.")
    sequence_length: int = Field(ge=1, description="Tokens of a sequence.")
    global_batch: int = Field(ge=1, description="Sequences of a step.")
    precision: str = Field(description="Of weights and activations.")
    held_out: float = Field(ge=0, description="Share of the tokens never trained on.")
    tokens: str = Field(pattern=_HEX, description="Digest of the tokens.")
    optimizer: dict[str, float | int | None] = Field(description="AdamW's settings, the learning rate's too.")
    model: dict[str, Any] = Field(description="Keys of the model's config.json.")
    initial_weights: str = Field(
        "", description="Digest of the weights it began with; empty: made from the seed."
    )

    def differences(self, other: TrainingSpec) -> list[str]:
        """What `other` has otherwise, in words."""
        found = []
        for name in type(self).model_fields:
            one, two = getattr(self, name), getattr(other, name)
            if one != two:
                shown = f"{one} there, {two} here" if isinstance(one, int | float) else "another one here"
                found.append(f"{name} ({shown})")
        return found


class Manifest(Spec):
    """A checkpoint: the state after `step` steps, so that step `step` comes next. The data position is `step` too, and
    the random state is none: rows and initial weights are functions of the seed."""

    version: Literal[1] = Field(1, description="Version of this format.")
    hethub: str = Field(description="Version of the program that wrote it.")
    run: str = Field(description="Name of the run.")
    attempt: int = Field(ge=1, description="The attempt that wrote it.")
    step: int = Field(ge=1, description="Steps done.")
    updates: int = Field(
        ge=0, description="Updates done: steps, less those skipped for a gradient that is no number."
    )
    learning_rate: float = Field(ge=0, description="Of the last step.")
    dtype: Literal["fp32", "fp64"] = Field(description="Of all numbers in the files.")
    plan: str = Field(pattern=_HEX, description="Digest of the plan that trained.")
    training: TrainingSpec = Field(description="What was trained.")
    parameters: tuple[StoredParameter, ...] = Field(
        description="All parameters; slices name them by their place."
    )
    files: tuple[StateFileSpec, ...] = Field(description="One a device.")

    @property
    def item_bytes(self) -> int:
        """Bytes of a number."""
        return ITEM_BYTES[self.dtype]

    def piece_bytes(self, piece: Piece) -> int:
        """Bytes of one slice of one kind."""
        return (piece[2] - piece[1]) * self.parameters[piece[0]].elements_per_index * self.item_bytes

    def data_bytes(self, file: StateFileSpec) -> int:
        """Bytes of a file without the digests at its end."""
        return len(KINDS) * sum(map(self.piece_bytes, file.slices))

    @property
    def state_bytes(self) -> int:
        """Bytes of all that has to be kept: three numbers an element."""
        return len(KINDS) * self.item_bytes * sum(math.prod(p.shape) for p in self.parameters)

    @property
    def saved_bytes(self) -> int:
        """Bytes of all files, without this manifest."""
        return sum(file.bytes for file in self.files)

    def model(self) -> Model:
        """The model that was trained. Raises CheckpointError where its config is none."""
        training = self.training
        try:
            return resolve_workload(
                WorkloadSpec(
                    model=training.model,
                    sequence_length=training.sequence_length,
                    global_batch=training.global_batch,
                    precision=training.precision,  # type: ignore[arg-type]  # validated here
                ),
                parse_document("{}", Path(MANIFEST)),
            ).model
        except (InputError, ValidationError) as error:
            raise CheckpointError(f"{MANIFEST}: training.model is no model: {error}") from error


def state_file_name(device: str) -> str:
    """A device's file in the checkpoint's folder."""
    return f"{device.replace('/', '-')}.state"


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's file."""
    rest = manifest.model_dump_json().encode() + b"\n"
    return b"hethub-checkpoint 1 %b\n" % hashlib.blake2b(rest, digest_size=32).hexdigest().encode() + rest


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest. Raises CheckpointError: absent, damaged, or at odds with itself."""
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{path}: no manifest ({error.strerror}): the checkpoint is not complete."
        ) from None
    first = _FIRST_LINE.match(content)
    rest = content[first.end() :] if first else b""
    if first is None or len(content) > _MAX_BYTES:
        raise CheckpointError(f"{path}:1: not a checkpoint's manifest.")
    if hashlib.blake2b(rest, digest_size=32).hexdigest().encode() != first[1]:
        raise CheckpointError(f"{path}:1: damaged: its content does not have this digest.")
    try:
        manifest = Manifest.model_validate_json(rest)
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        place = ".".join(map(str, item["loc"]))
        raise CheckpointError(f"{path}:2: {place}: {item['msg']}.") from None
    wrong = next(_contradictions(manifest), None)
    if wrong:
        raise CheckpointError(f"{path}:2: {wrong}.")
    return manifest


def _contradictions(manifest: Manifest) -> Iterator[str]:
    if any(size < 1 for p in manifest.parameters for size in p.shape) or any(
        p.axis >= len(p.shape) for p in manifest.parameters
    ):
        yield "parameters: a shape or axis is out of range"
        return
    if len({file.device for file in manifest.files}) != len(manifest.files):
        yield "files: a device stands twice"
    by_parameter: list[list[tuple[int, int]]] = [[] for _ in manifest.parameters]
    for file in manifest.files:
        for number, start, stop in file.slices:
            if not 0 <= number < len(by_parameter):
                yield f"files: {file.device} has a slice of parameter {number}, which is none"
                return
            by_parameter[number].append((start, stop))
    for parameter, spans in zip(manifest.parameters, by_parameter, strict=True):
        if not _tiles(sorted(spans), parameter.shape[parameter.axis]):
            yield f"files: the slices of {parameter.name} do not make it up, once each"
            return
    for file in manifest.files:
        data = manifest.data_bytes(file)
        if file.bytes != data + trailer_bytes(data, file.block_bytes):
            yield f"files: {file.device} has {file.bytes} bytes, its slices make up another number"


def _tiles(spans: Sequence[tuple[int, int]], size: int) -> bool:
    at = 0
    for start, stop in spans:
        if start != at or stop <= start:
            return False
        at = stop
    return at == size


BLOCK_DIGEST_BYTES = 16


def trailer_bytes(data_bytes: int, block_bytes: int) -> int:
    """Bytes of the block digests behind `data_bytes` of data."""
    return -(-data_bytes // block_bytes) * BLOCK_DIGEST_BYTES
