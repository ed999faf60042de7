from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hethub.timeline.record import RECORD, Kind, Timeline, TimelineInfo

UNSET: dict[str, Any] = {
    "lane": -1,
    "stage": -1,
    "micro_batch": -1,
    "peer": -1,
    "message": -1,
    "sent": np.nan,
}


def make(rows: list[dict[str, Any]], *, devices: int = 2, **info: Any) -> Timeline:
    """A timeline of these rows; `busy` is the whole of a compute action unless the row says otherwise."""
    records = np.zeros(len(rows), dtype=RECORD)
    for index, row in enumerate(rows):
        compute = row["kind"] not in (Kind.SEND, Kind.RECEIVE)
        full = UNSET | {"action": index, "busy": (row["end"] - row["start"]) * compute} | row
        for name, value in full.items():
            records[name][index] = value
    names = tuple(f"g/0/{device}" for device in range(devices))
    types = tuple("fast" if device % 2 == 0 else "slow" for device in range(devices))
    given = {"origin": "measured", "devices": names, "device_types": types, "emulated": False} | info
    return Timeline(TimelineInfo(**given), records)


def step_rows(step: int, at: float) -> list[dict[str, Any]]:
    """Two stages, one micro-batch, 10 s a step: device 0 forward, send, wait, backward; device 1 between."""
    first = {"step": step, "device": 0, "micro_batch": 0, "stage": 0}
    second = {"step": step, "device": 1, "micro_batch": 0, "stage": 1}
    return [
        first | {"kind": Kind.FORWARD, "start": at, "end": at + 2},
        first
        | {
            "kind": Kind.SEND,
            "start": at + 2,
            "end": at + 2.5,
            "message": 0,
            "peer": 1,
            "lane": 0,
            "bytes": 64,
        },
        first
        | {
            "kind": Kind.RECEIVE,
            "start": at + 2.5,
            "end": at + 8,
            "message": 1,
            "peer": 1,
            "lane": 0,
            "bytes": 64,
        },
        first | {"kind": Kind.BACKWARD, "start": at + 8, "end": at + 10, "busy": 1.5},
        first | {"kind": Kind.COLLECTIVE, "start": at + 9.5, "end": at + 10, "busy": 0.0, "action": 3},
        second
        | {"kind": Kind.RECEIVE, "start": at, "end": at + 3, "message": 0, "peer": 0, "lane": 0, "bytes": 64},
        second | {"kind": Kind.FORWARD, "start": at + 3, "end": at + 5},
        second | {"kind": Kind.BACKWARD, "start": at + 5, "end": at + 7},
        second
        | {
            "kind": Kind.SEND,
            "start": at + 7,
            "end": at + 7.5,
            "message": 1,
            "peer": 0,
            "lane": 0,
            "bytes": 64,
        },
    ]


@pytest.fixture
def timeline() -> Callable[..., Timeline]:
    return make


@pytest.fixture
def rows() -> Callable[[int, float], list[dict[str, Any]]]:
    return step_rows
