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
    """A cluster as kinds, and what to train on it. Zones of a region count as one, as in Sailor's search; `zones` names
    those of each region. `memory_bytes` is by device type, as the published check has it."""

    name: str
    objective: str
    decoders: int
    global_batch: int
    kinds: tuple[Kind, ...]
    zones: Mapping[str, tuple[str, ...]]
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
    counts: dict[tuple[str, str], int] = {}
    zones: dict[str, list[str]] = {}
    for group in entry["groups"]:
        region = group["zone"].rpartition("-")[0]
        key = (group["device_type"], region)
        counts[key] = counts.get(key, 0) + group["nodes"] * group["devices_per_node"]
        if group["zone"] not in zones.setdefault(region, []):
            zones[region].append(group["zone"])
    used = sorted({name for name, _ in counts})
    return PublishedProblem(
        name=entry["problem_id"],
        objective=entry["objective"],
        decoders=training["decoder_layers"],
        global_batch=training["global_batch"],
        kinds=tuple(_kind(name, region, count, types[name]) for (name, region), count in counts.items()),
        zones={region: tuple(names) for region, names in zones.items()},
        memory_bytes={name: types[name]["memory_gib_check"] * _GIB for name in used},
        priced_rows=tuple(sorted({rows for name in used for rows in types[name]["micro_batch_profiled"]})),
    )


def _kind(name: str, region: str, count: int, device_type: dict[str, Any]) -> Kind:
    size = device_type["devices_per_node"]
    return Kind(
        name=f"{name} in {region}",
        device_type=name,
        region=region,
        count=count,
        node_size=size,
        degrees=tuple(d for d in device_type["tensor_parallel_profiled"] if d <= size),
    )
