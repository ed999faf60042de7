"""Reader of the published planning problems (`cluster_problems.json`, from Sailor's artifact, arXiv 2504.17096)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hethub.errors import InputError
from hethub.planners.baselines.split import Kind

__all__ = ["PublishedProblem", "load_problems"]

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedProblem:
    """A cluster as kinds, and what to train on it. `memory_bytes` is by device type, as the published check has it."""

    name: str
    objective: str
    decoders: int
    global_batch: int
    kinds: tuple[Kind, ...]
    memory_bytes: Mapping[str, int]
    priced_rows: tuple[int, ...]

    @property
    def devices(self) -> int:
        """Devices of all kinds."""
        return sum(kind.count for kind in self.kinds)


def load_problems(path: Path) -> dict[str, PublishedProblem]:
    """All problems of the file, by name. Raises InputError where it is no such file or a problem lacks a key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}). Name cluster_problems.json.") from None
    found = {}
    place = "the file"
    try:
        for entry in content["problems"]:
            place = f"problem {entry['problem_id']}"
            found[entry["problem_id"]] = _problem(content, entry)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: {place} lacks {error}. Name cluster_problems.json.") from None
    return found


def _problem(content: dict[str, Any], entry: dict[str, Any]) -> PublishedProblem:
    training, types = content["training"], content["device_types"]
    used = {group["device_type"] for group in entry["groups"]}
    return PublishedProblem(
        name=entry["problem_id"],
        objective=entry["objective"],
        decoders=training["decoder_layers"],
        global_batch=training["global_batch"],
        kinds=tuple(_kind(group, types[group["device_type"]]) for group in entry["groups"]),
        memory_bytes={name: types[name]["memory_gib_check"] * _GIB for name in sorted(used)},
        priced_rows=tuple(sorted({rows for name in used for rows in types[name]["micro_batch_profiled"]})),
    )


def _kind(group: dict[str, Any], device_type: dict[str, Any]) -> Kind:
    size = group["devices_per_node"]
    return Kind(
        name=f"{group['device_type']} in {group['zone']}",
        device_type=group["device_type"],
        zone=group["zone"],
        count=group["nodes"] * size,
        node_size=size,
        degrees=tuple(d for d in device_type["tensor_parallel_profiled"] if d <= size),
    )
