"""Where to kill workers: points of a plan's program, by seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.program.actions import Program
from hethub.program.compile import compile_program
from hethub.specs.layout import lay_out
from hethub.specs.plan import load_plan

__all__ = ["Point", "kill_points", "kinds_of"]

Point = dict[str, Any]
"""A fault as the job file has it."""


@lru_cache(maxsize=4)
def _read(plan_file: Path) -> tuple[Program, tuple[str, ...]]:
    plan, _ = load_plan(plan_file)
    program = compile_program(lay_out(plan), ComputeModel(CostGraph(plan.cluster), plan.workload))
    return program, tuple(device.name for device in plan.cluster.devices())


def kill_points(plan_file: Path, seed: int, count: int, steps: int, every: int) -> list[Point]:
    """`count` kills at other steps each, from 1 to `steps` - 1, over all kinds of actions and phases in turn.

    An attempt that begins at a step leaves out what the step before would have sent, so such actions are not chosen in
    steps before which there is a checkpoint, every `every` steps.
    """
    chosen = random.Random(seed)
    program, names = _read(plan_file)
    places: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for device in program.layout.used:
        for number, action in enumerate(program.devices[device]):
            for phase in ("before", "during", "after"):
                places.setdefault((int(action.kind), phase), []).append((device, number))
    kinds = sorted(places)
    chosen.shuffle(kinds)
    found = []
    for step in sorted(chosen.sample(range(1, steps), count)):
        # The kind whose turn has been longest ago and that this step has; a step without it does not cost it its turn.
        here = {
            kind: [
                (d, n) for d, n in places[kind] if step % every or not program.carried(program.devices[d][n])
            ]
            for kind in kinds
        }
        kind = next(kind for kind in kinds if here[kind])
        kinds.remove(kind)
        kinds.append(kind)
        device, action = chosen.choice(here[kind])
        found.append(
            {"device": names[device], "step": step, "action": action, "phase": kind[1], "do": "kill"}
        )
    return found


def kinds_of(points: Sequence[Point], plan_file: Path) -> set[tuple[int, str]]:
    """(kind of action, phase) of each point."""
    program, names = _read(plan_file)
    return {(int(program.devices[names.index(p["device"])][p["action"]].kind), p["phase"]) for p in points}
