"""Device names and their ranges: `g/0-3/0-7, g/4/0-4` is group/node/device, inclusive, node-major."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

__all__ = ["MAX_DEVICES", "format_devices", "parse_devices"]

MAX_DEVICES = 1_000_000  # a range that expands to more is a slip of the pen, not a cluster

_RANGE = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})/([0-9]{1,7})(?:-([0-9]{1,7}))?/([0-9]{1,7})(?:-([0-9]{1,7}))?"
)

Span = tuple[int, int]  # inclusive here, as in the text


def _span(first: str, last: str | None, entry: str) -> Span:
    span = int(first), int(first if last is None else last)
    if span[0] > span[1]:
        raise ValueError(f"{entry!r}: the range {span[0]}-{span[1]} runs backwards")
    return span


def parse_devices(text: str) -> list[str]:
    """Names of all devices that `text` lists, in its order.

    Raises ValueError, ready to be shown, on anything but comma-separated group/nodes/devices entries.
    """
    names: list[str] = []
    for entry in text.split(","):
        found = _RANGE.fullmatch(entry.strip())
        if found is None:
            raise ValueError(f"{entry.strip()!r} is not group/node/device, such as a/0/3 or a/0-3/0-7")
        group = found[1]
        nodes, indices = _span(found[2], found[3], found[0]), _span(found[4], found[5], found[0])
        count = (nodes[1] - nodes[0] + 1) * (indices[1] - indices[0] + 1)
        if len(names) + count > MAX_DEVICES:
            raise ValueError(f"{entry.strip()!r} makes more than {MAX_DEVICES} devices")
        inner = range(indices[0], indices[1] + 1)
        names.extend(f"{group}/{node}/{index}" for node in range(nodes[0], nodes[1] + 1) for index in inner)
    return names


def _split(name: str) -> tuple[str, int, int]:
    group, node, index = name.split("/")
    return group, int(node), int(index)


def _text(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def format_devices(names: Sequence[str]) -> str:
    """Ranges for `names`, order kept: `parse_devices` gives them back.

    Runs of indices within a node come first, then runs of consecutive nodes with the same indices.
    """
    rows: list[tuple[str, int, Span]] = []  # group, node, indices
    for group, node, index in map(_split, names):
        if rows and rows[-1][:2] == (group, node) and rows[-1][2][1] + 1 == index:
            rows[-1] = (group, node, (rows[-1][2][0], index))
        else:
            rows.append((group, node, (index, index)))
    entries = []
    # Consecutive nodes keep node - position constant, so that groupby gathers each run.
    for _, run in groupby(enumerate(rows), key=lambda item: (item[1][0], item[1][1] - item[0], item[1][2])):
        found = [row for _, row in run]
        group, node, indices = found[0]
        entries.append(f"{group}/{_text(node, found[-1][1])}/{_text(*indices)}")
    return ", ".join(entries)
