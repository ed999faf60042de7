"""How near our plans come to the homogeneous bound, and to the best of the plan space, with our own cost model.

The cheapest cheats, and what makes them fail: a bound lowered by types that hold nothing (`not_a_bound` must be empty);
a small batch, or another cluster (the shipped specs are read as they are); a step that the closed form gives and the
simulator does not (shares are of simulated steps); a gap without a bound (no plan's closed form may be below it).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.results import ROOT
from hethub import catalog
from hethub.planners.answer import Answer, answer
from hethub.specs.cluster import load_planning
from hethub.specs.llama_config import model_from_config

__all__ = ["planner_shares"]

SPECS = ROOT / "cluster_specs"
# figure's name: cluster, model (None: the file's own), figures that it gives
PROBLEMS: dict[str, tuple[Path, str | None]] = {
    "8": (SPECS / "laptop.yaml", None),
    "768": (SPECS / "hethub-768.yaml", None),
    "768_70b": (SPECS / "hethub-768.yaml", "llama-70b"),
    "six_vendors": (SPECS / "six-vendors.yaml", "llama-13b"),  # its own 70B fits three of the six types alone
}


def planner_shares() -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """(Figures `homogeneous_share_*` and `gap_*`, what is behind them, what makes them worth nothing)."""
    figures: dict[str, float] = {}
    raw: dict[str, Any] = {}
    problems: list[str] = []
    for name, (path, model) in PROBLEMS.items():
        found = _answer(path, model)
        share, search = found.figures["share"], found.figures["search"]
        if share["homogeneous_bound"] is None:
            problems.append(f"{name}: no device type holds the model alone")
            continue
        figures[f"gap_{name}"] = search["proven_gap"]
        if name != "8":  # whose devices hold the model together only
            figures[f"homogeneous_share_{name}"] = share["homogeneous_bound"]
            if share["not_a_bound"]:
                problems.append(f"{name}: {', '.join(share['not_a_bound'])} cannot hold the model alone")
        if (
            search["lower_bound_seconds"] is None
            or search["lower_bound_seconds"] > search["closed_form_seconds"]
        ):
            problems.append(f"{name}: nothing proves the gap")
        raw[name] = {
            "step_seconds": found.figures["step_seconds"],
            "bounds": found.figures["bounds"],
            "share": share,
            "search": {key: value for key, value in search.items() if key != "runners_up"},
        }
    return figures, raw, problems


def _answer(path: Path, model: str | None) -> Answer:
    told = load_planning(path)
    workload = told.workload
    if model is not None:
        known = model_from_config(catalog.model(model), model, lambda keys, text: None)
        assert known is not None
        workload = replace(workload, model=known)
    return answer(told.cluster, workload, constraints=told.constraints, objective=told.objective)
