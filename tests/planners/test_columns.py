"""Bounds of pipelines, term by term: none is above what the closed form gives, whatever stands beside the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import HealthCheck, given, settings

from hethub.planners.columns import SEGMENTS, Columns, Tails
from hethub.planners.interface import Problem
from hethub.planners.priced import Search
from hethub.planners.stage import Setting
from tests.planners.brute_force import set_up
from tests.planners.examples import problems

PIPELINES = 60  # looked at of each problem
NEAR = 1e-9


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems())
def test_no_term_of_a_pipelines_bound_is_above_its_price(problem: Problem) -> None:
    """Seen to catch, each: fill, hops, update, gradients or period a few per cent too long, and a segment's end taken
    for its start."""
    chains, space = set_up(problem)
    batch = problem.workload.global_batch
    search = Search(chains, space, batch, 1, lambda: False, None)
    columns = search.columns.refined() if len(search.columns) else search.columns
    for number in range(0, len(columns), max(1, len(columns) // PIPELINES)):
        crew, rows = columns.crew(number), int(columns.rows[number])
        for setting, tails in _settings(search, columns, number):
            chain = chains.chain(crew, rows, setting)
            if chain is None:
                continue
            assert chain.period_seconds >= columns.period[number] * (1 - NEAR)
            longer = chain.period_seconds / columns.period[number]
            allowed = [
                k
                for k, (start, end) in enumerate(zip(SEGMENTS, SEGMENTS[1:], strict=False))
                if start * (1 - NEAR) <= longer <= end * (1 + NEAR)
            ]
            tail = tails.update[:, number] + tails.gradients[:, number]
            assert columns.fill[allowed, number].min() <= chain.fill_seconds * (1 + NEAR)
            assert tail[allowed].min() <= chain.tail_seconds * (1 + NEAR)


def _settings(search: Search, columns: Columns, number: int) -> Iterator[tuple[Setting, Tails]]:
    """As many alike pipelines as there may be, dealt out in both ways; and one beside two unlike ones on all pools."""
    usage, pools = columns.usage[number], search.space.pools
    copies = int((search.available[usage > 0] // usage[usage > 0]).min())
    own = tuple(pool for pool, used in zip(pools, usage, strict=True) if used)
    deal = max(1, search.batch // (copies * int(columns.rows[number])))
    for number_of_them in sorted({1, copies}):
        tails = columns.tails(*search.rates(number_of_them, pools, alike=True))
        for stage_major in (False, True):
            yield Setting(number_of_them, 0, own, deal, stage_major), tails
    rates = search.rates(3, pools, alike=False, must=pools)
    yield Setting(1, 2, pools, deal), columns.tails(*(np.asarray(rate) for rate in rates))
