"""The one timeline record: what happened when on every device, predicted or measured.

The simulator and the workers write the same columns. `(device, action)` joins a predicted record to its measured twin
of every step: a program's actions repeat, so a prediction is its step 0 (with the neighbours -1 and 1 where it holds
them), and `action` is the index in the device's action list. Times are seconds of modelled time (an emulated run's wall
time divided by its `time_scale`; a real run's wall time), counted from the start of the timeline.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hethub.errors import InputError
from hethub.files import whole_file

__all__ = ["COMPUTE_KINDS", "RECORD", "USEFUL_KINDS", "Kind", "Lane", "Timeline", "TimelineInfo"]


class Kind(IntEnum):
    """What an action does. The values stand in files: append, never renumber."""

    FORWARD = 0
    BACKWARD = 1
    BACKWARD_INPUT = 2
    BACKWARD_WEIGHT = 3
    RECOMPUTE = 4
    SEND = 5
    RECEIVE = 6
    REDUCE = 7
    NORM = 8
    UPDATE = 9
    GATHER = 10
    COLLECTIVE = 11  # sub-event of the compute action with the same (step, device, action); not counted twice


class Lane(IntEnum):
    """The two first-in-first-out lanes of a channel."""

    ACTIVATIONS = 0
    PARAMETERS = 1


COMPUTE_KINDS = frozenset(
    {
        Kind.FORWARD,
        Kind.BACKWARD,
        Kind.BACKWARD_INPUT,
        Kind.BACKWARD_WEIGHT,
        Kind.RECOMPUTE,
        Kind.REDUCE,
        Kind.NORM,
        Kind.UPDATE,
        Kind.GATHER,
    }
)
USEFUL_KINDS = COMPUTE_KINDS - {Kind.RECOMPUTE}

RECORD = np.dtype(
    [
        ("step", "<i4"),
        ("device", "<i4"),  # index into TimelineInfo.devices
        ("action", "<i4"),  # index in the device's action list
        ("kind", "u1"),
        ("lane", "i1"),  # Lane of a send or receive, else -1
        ("stage", "<i2"),  # stage within the pipeline, -1 where none
        ("micro_batch", "<i4"),  # -1 where none
        ("peer", "<i4"),  # device index at the other end of a send or receive, else -1
        ("message", "<i4"),  # joins a send to its receive within one step, else -1
        ("start", "<f8"),  # seconds; a receive's start is when the device began to wait for it
        ("end", "<f8"),  # seconds; of a send: when the device was free again, not when it arrived
        (
            "busy",
            "<f8",
        ),  # seconds of the device's own compute inside [start, end]; the rest is exposed communication
        ("sent", "<f8"),  # seconds; of a receive: when the sender issued it (NaN if not known)
        ("real", "<f8"),  # wall seconds of real math inside the action; equals busy where nothing is emulated
        ("overrun", "<f8"),  # wall seconds of real work past the emulated deadline, 0 if none
        ("bytes", "<i8"),  # payload of a send or receive
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineInfo:
    """What a timeline is of.

    `devices` are names `group/node/device`, `device_types` the type of each. `emulated` marks modelled time and
    `time_scale` is wall seconds per modelled second (1 for a real run and for a prediction).
    """

    origin: str  # "predicted" or "measured"
    devices: tuple[str, ...]
    device_types: tuple[str, ...]
    emulated: bool
    time_scale: float = 1.0
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timeline:
    """`records` (dtype RECORD) in no particular order, and what they are of."""

    info: TimelineInfo
    records: npt.NDArray[np.void]

    def save(self, path: Path) -> None:
        """Write one compressed file, whole or not at all."""
        with whole_file(path) as temporary, temporary.open("wb") as stream:
            np.savez_compressed(
                stream,
                info=np.frombuffer(json.dumps(asdict(self.info)).encode(), dtype=np.uint8),
                records=self.records,
            )

    @classmethod
    def load(cls, path: Path) -> Timeline:
        """Read what `save` wrote. Raises InputError when the file is absent, torn or not a timeline."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                info = json.loads(stored["info"].tobytes().decode())
                records = stored["records"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path}: not a timeline file ({error}). Give the folder of a run.") from error
        try:
            for key in ("devices", "device_types"):
                info[key] = tuple(info[key])
            known = TimelineInfo(**info)
        except (TypeError, KeyError) as error:
            raise InputError(f"{path}: written by another version of HetHub ({error}).") from error
        if records.dtype != RECORD:
            raise InputError(f"{path}: written by another version of HetHub (its columns differ).")
        return cls(known, records)
