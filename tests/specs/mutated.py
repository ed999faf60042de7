"""Cluster, job and plan files that are nearly right: a good one with a few of its values or keys changed, by a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from hethub.errors import HetHubError
from hethub.program.check import require_valid
from hethub.specs.cluster import load_cluster
from hethub.specs.job import load_job
from hethub.specs.plan import load_plan
from tests.chaos.three_types import write_job

__all__ = ["READERS", "refused_or_read", "write_good_files"]

_JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 3, 0.5, -0.0, 1e308, 5e-324, 10**30, -(10**30), float("nan"), float("inf")),
    *("", " ", "a", "a/0/0", "b/0/0", "a/0/0-9999999999", "auto", "{}", "\n", "x" * 5000, "\u202e\x85\u2028"),
    *("../../etc/passwd", "stdlib:../*", "$(touch marker)", "'; touch marker; '"),
    *([], [[]], [None], {}, {"": None}, {"a": {"a": {"a": 1}}}, [1, 2], [2, 1], [0, 10**9]),
)


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    found: list[tuple[Any, Any]] = []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found.append((tree, key))
        found.extend(_places(value))
    return found


def mutated(good: Any, chosen: random.Random) -> Any:
    """One to three changes: a value replaced, by junk or by another of the tree's, left out, doubled, or renamed."""
    tree = copy.deepcopy(good)
    for _ in range(chosen.randint(1, 3)):
        places = _places(tree)
        if not places:
            break
        container, key = chosen.choice(places)
        deed = chosen.choice(("junk", "junk", "other", "out", "double", "rename", "scale"))
        value = container[key]
        if deed == "junk":
            container[key] = copy.deepcopy(chosen.choice(_JUNK))
        elif deed == "other":
            other, place = chosen.choice(places)
            container[key] = copy.deepcopy(other[place])
        elif deed == "out":
            del container[key]
        elif deed == "double" and isinstance(container, list):
            container.insert(key, copy.deepcopy(value))
        elif deed == "rename" and isinstance(container, dict):
            container[str(chosen.choice(_JUNK))] = container.pop(key)
        elif deed == "scale" and isinstance(value, (int, float)):
            container[key] = value * chosen.choice((-1, 2, 1000, 10**12))
    return tree


def _load_plan(file: Path) -> None:
    plan, document = load_plan(file)
    require_valid(plan, document, str(file))


READERS: Mapping[str, Callable[[Path], Any]] = {
    "cluster.yaml": load_cluster,
    "job.yaml": load_job,
    "plan.yaml": _load_plan,
}


def write_good_files(folder: Path) -> None:
    """A good job with all that it names; faults, checkpoints and policies in it."""
    write_job(
        folder,
        fault=[
            {"device": "b/0/1", "step": 4, "action": 0, "phase": "before", "do": "kill"},
            {"link": "desk-shelf", "do": "slow", "factor": 2.0, "step": 1, "steps": 3},
        ],
        on_failure={"restart": "replan", "max_restarts": 2, "not_a_number": "roll_back"},
        evaluate={"every": 3, "rows": 4},
        telemetry={"enabled": True, "listen": "127.0.0.1"},
    )


def refused_or_read(folder: Path, name: str, seed: int) -> None:
    """Read a changed copy of one of the good files, in its place beside the others. Whatever is wrong with it must be
    told in lines that begin with a file of the folder."""
    good = yaml.safe_load((folder / name).read_text())
    file = folder / f"changed-{name}"
    file.write_text(json.dumps(mutated(good, random.Random(seed))))
    try:
        READERS[name](file)
    except HetHubError as error:
        lines = error.message.splitlines()
        assert lines and all(line.startswith(str(folder)) for line in lines), (seed, error.message)
