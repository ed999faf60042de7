"""Constraints that cannot hold together: the smallest set of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from hethub.errors import InputError
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem

__all__ = ["conflict"]


def conflict(planner: FirstPlanner, problem: Problem) -> InputError | None:
    """The error that names the fewest constraints with which no plan fits; None where none fits without any either, or
    where one fits with all of them. That is looked at first: where it is the objective that nothing keeps, no set of
    constraints has to be tried. Sets are tried from the smallest on, so that the first one found has the fewest."""
    names = problem.constraints.names()
    if not names or _fits(planner, problem, names) or not _fits(planner, problem, ()):
        return None
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            if not _fits(planner, problem, chosen):
                return InputError(_message(problem, chosen))
    return None


def _fits(planner: FirstPlanner, problem: Problem, names: tuple[str, ...]) -> bool:
    # without time a search ends with the first plan that fits: no better one is asked for
    tried = replace(problem, constraints=problem.constraints.only(names), finalists=1, seconds=0.0)
    return planner.search(tried) is not None


def _message(problem: Problem, chosen: tuple[str, ...]) -> str:
    places = problem.constraints.places
    named = [" ".join(filter(None, (places.get(name), f"constraints.{name}"))) for name in chosen]
    together = "cannot hold" if len(chosen) == 1 else "cannot hold together"
    return (
        f"{' and '.join(named)} {together}: no plan of {problem.workload.model.name} on {problem.cluster.name} keeps "
        "to that, and without it one fits. Relax it."
    )
