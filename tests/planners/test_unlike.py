"""Bounds of plans that stand unlike pipelines side by side: no such plan is below them, whole or split."""

from __future__ import annotations

import math
from itertools import combinations
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hethub.planners import unlike
from hethub.planners.candidate import price
from hethub.planners.interface import Problem
from hethub.planners.priced import Search
from hethub.planners.unlike import NEAR, Branch, roots
from tests.plan_strategies import clusters, models
from tests.planners.brute_force import set_up
from tests.planners.examples import with_memory, workload

SPLITS = 10  # of the branch with the least bound
PAIRS = 150  # priced of each problem
KIB = 1 << 10


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    """Several device types, so much memory that two pipelines fit, and enough rows for both."""
    cluster = draw(clusters().filter(lambda c: 2 < len(c.devices()) <= 6 and len(c.node_groups) > 1))
    memory = draw(st.integers(200, 2000)) * KIB
    return Problem.of(with_memory(cluster, memory), workload(draw(models()), batch=draw(st.integers(4, 24))))


def _best_pair(search: Search) -> float:
    """The least closed form of some pairs of pipelines, those with the best bounds first."""
    columns, best = search.columns, math.inf
    order = (columns.fill[0] + columns.period * search.batch).argsort(kind="stable")[: 4 * PAIRS]
    fitting = (
        (int(one), int(other))
        for one, other in combinations(order, 2)
        if (columns.usage[one] + columns.usage[other] <= search.available).all()
    )
    for number, (one, other) in enumerate(fitting):
        if number == PAIRS:
            break
        candidate = price(search.chains, search.parts(((one, 1), (other, 1))), search.batch)
        best = best if candidate is None else min(best, candidate.seconds)
    return best


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(problem=_problems())
def test_no_unlike_plan_is_below_the_bound_of_any_split(problem: Problem) -> None:
    """The search prices nothing here, so that only its bounds can hold. Seen to catch: the longest tail added to a
    pipeline's own, instead of waited for."""
    chains, space = set_up(problem)
    search = Search(chains, space, problem.workload.global_batch, 1, lambda: False, None)
    best = _best_pair(search) if len(search.columns) else math.inf
    if math.isinf(best):
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


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(problem=_problems())
def test_looking_at_few_columns_first_changes_no_bound(problem: Problem) -> None:
    """Seen to catch: what the few columns need taken for the bound of all; and a real bug: more pipelines than there
    are devices, which update sooner, made shorter times possible than longer ones."""
    chains, space = set_up(problem)
    search = Search(chains, space, problem.workload.global_batch, 1, lambda: False, None)
    best = _best_pair(search) if len(search.columns) else math.inf
    if math.isinf(best):
        return
    directly = [branch.find_bound(0.0, 2 * best) for branch in roots(search)]
    with patch.object(unlike, "_CHOSEN_FROM", 2):
        by_few = [branch.find_bound(0.0, 2 * best) for branch in roots(search)]
    for one, other in zip(directly, by_few, strict=True):
        assert abs(one - other) <= 2 * NEAR * one
