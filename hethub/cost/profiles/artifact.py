"""Importer of the CSV files made from the artifact of Sailor (SOSP 2025, arXiv 2504.17096).

It takes the tables layer_profiles, link_bandwidth and collective_times, as they were published, into the profile
format: rows marked as edited by hand are left out, bandwidth polynomials are sampled only where they were fitted and
never above the largest measured bandwidth.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from hethub.cost.profiles.profile import LayerRow, Profile, TransferRow
from hethub.cost.profiles.table import UNITS
from hethub.errors import InputError

__all__ = ["import_artifact", "inter_link_class", "intra_link_class"]

_SEQUENCE_LENGTH, _DTYPE = 2048, "fp32"
_MS, _MIB = UNITS["time"]["ms"], UNITS["size"]["MiB"]
_TRUSTED = ("measured", "measured_rounded")
# The fitted polynomials are negative below 128 KiB on fast links; the largest message measured was 1 GiB.
_SMALLEST_LOG2, _LARGEST_LOG2 = 18, 30


def intra_link_class(device_type: str) -> str:
    """The link class between devices of a type inside one node."""
    return f"intra/{device_type}"


def inter_link_class(sender: str, receiver: str) -> str:
    """The link class between nodes of two device types, in this direction."""
    return f"inter/{sender}/{receiver}"


def import_artifact(folder: Path, *, clusters: tuple[str, ...] = ("alps-clariden", "mit")) -> Profile:
    """The profile that the artifact's tables hold; links of `clusters` only (device types repeat across them).

    Raises InputError with file, line and column where a table is missing or a value is no number.
    """
    transfers = (*_collectives(folder / "collective_times.csv"), *_links(folder, clusters))
    return Profile(tuple(_layers(folder / "layer_profiles.csv")), transfers)


def _read(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            yield from enumerate(csv.DictReader(stream), start=2)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Name the data's folder.") from None


def _number(path: Path, line: int, row: dict[str, str], column: str) -> float:
    text = row.get(column)
    try:
        value = float(text or "")
    except ValueError:
        raise InputError(f'{path}:{line} {column}: "{text}" is not a number. Mend the row.') from None
    if not math.isfinite(value):
        raise InputError(f"{path}:{line} {column}: {text} is not finite. Mend the row.")
    return value


def _layers(path: Path) -> Iterator[LayerRow]:
    """The optimizer step was timed for a model of embedding, two decoders and head; a layer's share is by elements.

    Where a set rounded to 0.1 ms stands beside the same layer's exact one, the exact one is taken.
    """
    rows = [(line, row) for line, row in _read(path) if row.get("origin") in _TRUSTED]
    rows.sort(key=lambda entry: _TRUSTED.index(entry[1]["origin"]))
    elements: dict[tuple[str, ...], float] = defaultdict(float)
    chosen: dict[tuple[str, ...], tuple[int, dict[str, str]]] = {}
    for line, row in rows:
        run = tuple(row[k] for k in ("model", "device_type", "tensor_parallel", "micro_batch"))
        if chosen.setdefault((*run, row["layer_kind"]), (line, row))[0] == line:
            elements[run] += _number(path, line, row, "parameters")
    for (*place, _), (line, row) in chosen.items():
        parameters = _number(path, line, row, "parameters")
        step = row["optimizer_step_ms"]
        timed = row["layer_kind"] != "embedding"  # the hooks did not see the embedding's backward
        backward = _number(path, line, row, "backward_ms") * _MS
        share = parameters / elements[tuple(place)]
        yield LayerRow(
            model=row["model"],
            device_type=row["device_type"],
            layer_kind=row["layer_kind"],
            tensor_parallel=int(_number(path, line, row, "tensor_parallel")),
            micro_batch=int(_number(path, line, row, "micro_batch")),
            sequence_length=_SEQUENCE_LENGTH,
            dtype=_DTYPE,
            forward_seconds=_number(path, line, row, "forward_ms") * _MS,
            backward_seconds=backward if timed else None,
            update_seconds=_number(path, line, row, "optimizer_step_ms") * _MS * share if step else None,
            parameters=int(parameters),
        )


def _collectives(path: Path) -> Iterator[TransferRow]:
    seen: set[tuple[str, str, int, float]] = set()
    for line, row in _read(path):
        entry = TransferRow(
            operation=row["collective"],
            link_class=intra_link_class(row["device_type"]),
            group_size=int(_number(path, line, row, "devices")),
            message_bytes=_number(path, line, row, "message_mib") * _MIB,
            time_seconds=_number(path, line, row, "time_ms") * _MS,
        )
        key = (entry.operation, entry.link_class, entry.group_size, entry.message_bytes)
        if key not in seen:  # sizes are rounded down to a MiB, so some repeat: the first is the nearest
            seen.add(key)
            yield entry


def _links(folder: Path, clusters: tuple[str, ...]) -> Iterator[TransferRow]:
    """Bandwidth in GB/s = a x^2 + b x + c with x = log2(bytes / 1e6), summed over the pairs that send at once."""
    path = folder / "link_bandwidth.csv"
    seen: set[tuple[str, int]] = set()
    for line, row in _read(path):
        if row["cluster"] not in clusters or row["scope"] not in ("intra_node", "inter_node"):
            continue
        sender, receiver = row["sender_device_type"], row["receiver_device_type"]
        inside = row["scope"] == "intra_node"
        name = intra_link_class(sender) if inside else inter_link_class(sender, receiver)
        pairs = int(_number(path, line, row, "sender_gpus"))
        if (name, pairs) in seen:
            continue
        seen.add((name, pairs))
        a, b, c, most = (
            _number(path, line, row, k)
            for k in ("coef_log2_squared", "coef_log2", "coef_constant", "max_measured_gb_per_s")
        )
        for power in range(_SMALLEST_LOG2, _LARGEST_LOG2 + 1):
            size = 2.0**power
            x = math.log2(size / 1e6)
            bandwidth = min(a * x * x + b * x + c, most) * 1e9
            if bandwidth > 0:
                yield TransferRow(
                    operation="send",
                    link_class=name,
                    group_size=pairs,
                    message_bytes=size,
                    time_seconds=pairs * size / bandwidth,
                )
