"""The least period of a pipeline: the loop that numba compiles and the one over arrays find the same."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings

from hethub.planners.interface import Problem
from hethub.planners.periods import least_periods, single_periods
from hethub.planners.priced import Search
from tests.planners.brute_force import set_up
from tests.planners.examples import problems

PIPELINES = 20  # looked at of each problem
NEAR = 1e-3  # as near as both bisections together come
ENDS = np.array([1.01, 1.4])


@settings(max_examples=60)
@given(problem=problems())
def test_both_loops_find_the_same_periods(problem: Problem) -> None:
    """Seen to catch, in the one that is compiled: pipelines that only their longest period lets fit left out, and the
    search beyond the period by time stopped at its first step."""
    chains, space = set_up(problem)
    columns = Search(chains, space, problem.workload.global_batch, 1, lambda: False, None).columns
    if not len(columns):
        return
    some = columns.taken(np.arange(0, len(columns), max(1, len(columns) // PIPELINES)))
    given_ = (some.table, some.places, some.counts, some.period, some.layers, ENDS)
    together, _ = least_periods(*given_)
    apart, others = np.empty(len(some)), np.empty((len(ENDS), len(some)))
    single_periods(*given_, apart, others)
    fits = np.isfinite(together)
    assert (np.isfinite(apart) == fits).all()
    assert (np.abs(apart[fits] / together[fits] - 1) <= NEAR).all()
    held = np.minimum(others, some.layers)
    assert (held[0] <= held[1]).all()  # a longer period lets stages hold more
