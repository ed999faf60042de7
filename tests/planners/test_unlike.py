"""Bounds of plans that stand unlike pipelines side by side: no such plan is below them, whole or split."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, given, settings

from hethub.planners.interface import Problem
from hethub.planners.priced import Search
from hethub.planners.unlike import Branch, roots
from tests.planners.brute_force import best_of_all, set_up, tiny_problems

SPLITS = 6  # of the branch with the least bound


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
@given(problem=tiny_problems())
def test_no_unlike_plan_is_below_the_bound_of_any_split(problem: Problem) -> None:
    """Nothing is priced here, so that only bounds can hold. Seen to catch: the longest period of a segment counted
    where its shortest belongs, a pipeline kept whose own tail is shorter than the branch's least."""
    chains, space = set_up(problem)
    batch = problem.workload.global_batch
    best = best_of_all(chains, space, batch, unlike=True)
    search = Search(chains, space, batch, 1, lambda: False, None)
    if not len(search.columns) or math.isinf(best):
        return
    open_branches: list[Branch] = list(roots(search))
    for branch in open_branches:
        branch.find_bound(0.0, 2 * best)
    assert min(branch.bound for branch in open_branches) <= best * (1 + 1e-9)
    for _ in range(SPLITS):
        least = min(open_branches, key=lambda branch: branch.bound)
        parts = least.split()
        if not parts:
            break
        for part in parts:
            part.find_bound(0.0, 2 * best)
        open_branches = [branch for branch in open_branches if branch is not least] + parts
        assert min(branch.bound for branch in open_branches) <= best * (1 + 1e-9)
