"""Timelines as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Format: "Trace Event Format" (Google), JSON object form: complete events `X`, flow events `s` and `f`,
metadata events `M`; times in microseconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hethub.files import whole_file
from hethub.timeline.record import RECORD, Kind, Lane, Timeline

__all__ = ["kind_label", "write_chrome_trace"]

Event = dict[str, Any]
Records = npt.NDArray[np.void]


def kind_label(kind: int) -> str:
    """Return the name of a Kind as people read it, as in `backward-input`."""
    return Kind(kind).name.lower().replace("_", "-")


def write_chrome_trace(path: Path, timelines: list[Timeline], steps: Collection[int]) -> None:
    """Write `steps` of each timeline as one process with a thread per device, whole or not at all.

    A timeline's own first action is at 0, so that a predicted step lies beside a measured one. A prediction
    is of every step: its step 0 is shown. Raises OSError when the file cannot be written.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write('{"displayTimeUnit": "ms", "traceEvents": [')
        separator = "\n"
        for process, timeline in enumerate(timelines, start=1):
            for event in _events(process, timeline, steps):
                stream.write(separator + json.dumps(event, allow_nan=False))
                separator = ",\n"
        stream.write("\n]}\n")


def _events(process: int, timeline: Timeline, steps: Collection[int]) -> Iterator[Event]:
    records = timeline.records
    shown = [0] if timeline.info.origin == "predicted" else list(steps)
    records = records[np.isin(records["step"], shown)]
    # The viewer nests an event in the one before it when its time lies inside, so the longer goes first.
    records = records[np.lexsort((-records["end"], records["start"], records["device"]))]
    yield from _names(process, timeline)
    if len(records):
        origin = float(records["start"].min())
        yield from _complete(process, timeline, records, origin)
        yield from _flows(process, records, origin)


def _names(process: int, timeline: Timeline) -> Iterator[Event]:
    info = timeline.info
    name = f"{info.origin} (emulated)" if info.emulated else info.origin
    yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    for index, (device, device_type) in enumerate(zip(info.devices, info.device_types, strict=True)):
        thread = {"pid": process, "tid": index + 1}
        yield {"ph": "M", "name": "thread_name", **thread, "args": {"name": f"{device} ({device_type})"}}
        yield {"ph": "M", "name": "thread_sort_index", **thread, "args": {"sort_index": index}}


def _complete(process: int, timeline: Timeline, records: Records, origin: float) -> Iterator[Event]:
    # Both ends are rounded to nanoseconds, not start and length: rounding keeps order, so nesting survives.
    starts = np.rint((records["start"] - origin) * 1e9).astype(np.int64).tolist()
    ends = np.rint((records["end"] - origin) * 1e9).astype(np.int64).tolist()
    for row, start, end in zip(records.tolist(), starts, ends, strict=True):
        fields = dict(zip(RECORD.names or (), row, strict=True))
        kind = kind_label(fields["kind"])
        yield {
            "ph": "X",
            "name": kind if fields["micro_batch"] < 0 else f"{kind} {fields['micro_batch']}",
            "cat": kind,
            "pid": process,
            "tid": fields["device"] + 1,
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            "args": _arguments(fields, timeline),
        }


def _arguments(fields: dict[str, Any], timeline: Timeline) -> Event:
    """Return the fields that are set and that the event does not say elsewhere."""
    named = ("step", "action", "stage", "micro_batch", "message")
    arguments: Event = {name: fields[name] for name in named if fields[name] >= 0}
    if fields["lane"] >= 0:
        arguments["lane"] = Lane(fields["lane"]).name.lower()
    if fields["peer"] >= 0:
        arguments["peer"] = timeline.info.devices[fields["peer"]]
        arguments["bytes"] = fields["bytes"]
    arguments |= {f"{name}_seconds": fields[name] for name in ("busy", "real", "overrun")}
    if not math.isnan(fields["sent"]):
        arguments["sent_seconds"] = fields["sent"]
    return arguments


def _flows(process: int, records: Records, origin: float) -> Iterator[Event]:
    """Draw an arrow from every send to its receive."""
    sends = records[(records["kind"] == Kind.SEND) & (records["message"] >= 0)]
    receives = records[(records["kind"] == Kind.RECEIVE) & (records["message"] >= 0)]
    _, left, right = np.intersect1d(_key(sends), _key(receives), return_indices=True)
    for number, (send, receive) in enumerate(zip(sends[left], receives[right], strict=True)):
        flow = {"name": "message", "cat": "message", "id": (process << 40) + number, "pid": process}
        # An arrow attaches to the event that is open at its time; the middle is inside for certain.
        yield {"ph": "s", **flow, "tid": int(send["device"]) + 1, "ts": _middle(send, origin)}
        yield {
            "ph": "f",
            "bp": "e",
            **flow,
            "tid": int(receive["device"]) + 1,
            "ts": _middle(receive, origin),
        }


def _key(records: Records) -> npt.NDArray[np.int64]:
    """Return the (step, message) of each record as one number."""
    return np.asarray((records["step"].astype(np.int64) << 32) | records["message"].astype(np.int64))


def _middle(record: np.void, origin: float) -> float:
    return round(((float(record["start"]) + float(record["end"])) / 2 - origin) * 1e9) / 1000
