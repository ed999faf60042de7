"""Bounds of pipelines: none is above what the closed form gives, whatever stands beside the pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given, settings

from hethub.planners.columns import Columns, Tails
from hethub.planners.interface import Problem
from hethub.planners.priced import Search
from hethub.planners.stage import Setting
from tests.planners.brute_force import set_up
from tests.planners.examples import problems

PIPELINES = 60  # looked at of each problem
MICRO_BATCHES = (1, 2, 3, 7, 40)
NEAR = 1e-9


@settings(max_examples=40)
@given(problem=problems())
def test_no_pipeline_is_quicker_than_its_bound(problem: Problem) -> None:
    """Seen to catch, each: fill 3 %, hops 20 % or period 2 % too long, a segment's end taken for its start; and three
    real bugs: a first stage bounded by the memory of an inner one, few micro-batches by the memory of as many as a long
    step has in flight, a stage that unlike devices share by a link that its gradients do not take. Not the updates 5 %
    too long: their bound is looser than that."""
    chains, space = set_up(problem)
    search = Search(chains, space, problem.workload.global_batch, 1, lambda: False, None)
    columns = search.columns.refined() if len(search.columns) else search.columns
    for number in range(0, len(columns), max(1, len(columns) // PIPELINES)):
        crew, rows = columns.crew(number), int(columns.rows[number])
        for setting, tails in _settings(search, columns, number):
            chain = chains.chain(crew, rows, setting)
            if chain is not None:
                count = setting.micro_batches
                bound = columns.seconds(np.full(len(columns), count), tails)[number]
                assert bound <= (chain.seconds(count) + chain.tail_seconds) * (1 + NEAR)


def _settings(search: Search, columns: Columns, number: int) -> Iterator[tuple[Setting, Tails]]:
    """As many alike pipelines as there may be, dealt out in both ways; and one beside unlike ones, on all pools."""
    usage, pools = columns.usage[number], search.space.pools
    copies = int((search.available[usage > 0] // usage[usage > 0]).min())
    own = tuple(pool for pool, used in zip(pools, usage, strict=True) if used)
    others = min(2, int(search.available.sum() - usage.sum()))
    for count in MICRO_BATCHES:
        for alike in sorted({1, copies}):
            tails = columns.tails(*search.rates(alike, pools, alike=True))
            for stage_major in (False, True):
                yield Setting(alike, 0, own, count, stage_major), tails
        if others:
            rates = search.rates(1 + others, pools, alike=False, must=pools)
            yield Setting(1, others, pools, count), columns.tails(*rates)
