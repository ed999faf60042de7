"""`hethub diff PLAN PLAN`: what changes from one plan to another, in words."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hethub.cli.measured import CalibrationOption, ProfilesOption, StrictOption

if TYPE_CHECKING:
    from hethub.planners.diff import PlanDiff
    from hethub.specs.plan import Plan

__all__ = ["diff"]

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def diff(
    old: Annotated[Path, typer.Argument(help="A plan file, as `hethub plan` writes it.")],
    new: Annotated[Path, typer.Argument(help="The plan file to compare it with, of the same model.")],
    profiles: ProfilesOption = None,
    strict: StrictOption = False,
    calibration: CalibrationOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what changes between two plans: devices, layers moved, bytes to move, the predicted step.

    Example: hethub diff plan.yaml other.yaml
    """
    from hethub.cli.measured import read_measured
    from hethub.planners.diff import diff_plans

    one, other = _load(old), _load(new)
    measured = read_measured(other.cluster, other.workload, profiles, calibration, strict=strict)
    found = diff_plans(one, other, measured)
    typer.echo(json.dumps(asdict(found), indent=2) if as_json else "\n".join(_lines(found)))


def _load(path: Path) -> Plan:
    from hethub.program.check import require_valid
    from hethub.specs.plan import load_plan

    plan, document = load_plan(path)
    require_valid(plan, document, str(path))
    return plan


def _lines(found: PlanDiff) -> list[str]:
    one, other = found.shapes
    lines = ["pipelines\tthe same: " + one if one == other else f"pipelines\t{one}, then {other}"]
    if found.joined or found.left:
        lines.append(f"devices\t{len(found.joined)} come into use, {len(found.left)} are left out")
    for name, (before, after) in found.decoders.items():
        if before != after:
            lines.append(f"decoders\ton a {name} {before:.3g} on average, then {after:.3g}")
    if not found.changed_devices and not found.state_bytes:
        return [*lines, "layers\tevery device holds what it held", *_step(found)]
    lines.append(
        f"layers\t{found.changed_devices} devices hold others or other shares; {found.moved_layers} layers go to a "
        "device that did not have them"
    )
    lines.append(
        f"bytes to move\t{_size(found.weight_bytes)} of weights, {_size(found.state_bytes)} of optimizer state"
    )
    return [*lines, *_step(found)]


def _step(found: PlanDiff) -> list[str]:
    before, after = found.step_seconds
    if before is None or after is None:
        return ["step\tunknown: one of the plans holds no prediction. `hethub plan` writes it."]
    change = after / before - 1
    words = "as long" if abs(change) < 5e-4 else f"{abs(change):.1%} {'longer' if change > 0 else 'shorter'}"
    return [f"step\t{before:.4g} s, then {after:.4g} s predicted: {words}"]


def _size(size_bytes: int) -> str:
    for unit, name in _UNITS:
        if size_bytes >= unit:
            return f"{size_bytes / unit:.3g} {name}"
    return f"{size_bytes} bytes"
