"""Bounds of pipelines: none is above what the closed form gives, whatever stands beside the pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.planners.chain import Chain, Chains
from hethub.planners.columns import SEGMENTS, Columns, Tails
from hethub.planners.interface import Problem
from hethub.planners.pools import Pools
from hethub.planners.priced import Search
from hethub.planners.seats import SeatCosts
from hethub.planners.stage import Setting
from hethub.specs.cluster import Link
from tests.plan_strategies import clusters, models, tiny_model
from tests.planners.brute_force import set_up
from tests.planners.examples import problems, with_memory, workload

PIPELINES = 60  # looked at of each problem
MICRO_BATCHES = (1, 2, 3, 7, 40)
NEAR = 1e-9


@settings(max_examples=40)
@given(problem=problems())
def test_no_pipeline_is_quicker_than_its_bound(problem: Problem) -> None:
    """Seen to catch, each: fill 3 %, hops 20 % or period 2 % too long, a segment's end taken for its start; and three
    real bugs: a first stage bounded by the memory of an inner one, few micro-batches by the memory of as many as a long
    step has in flight, a stage that unlike devices share by a link that its gradients do not take."""
    for columns, number, tails, setting, chain in _priced(problem, PIPELINES):
        count = setting.micro_batches
        bound = columns.seconds(np.full(len(columns), count), tails)[number]
        assert bound <= (chain.seconds(count) + chain.tail_seconds) * (1 + NEAR)


@st.composite
def _deep(draw: st.DrawFn) -> Problem:
    """So many layers that embedding and head, which bounds leave out, are little beside them; plenty of memory."""
    model = tiny_model(layers=draw(st.integers(24, 40)))
    return Problem.of(draw(clusters()), workload(model, batch=draw(st.integers(1, 12))))


@st.composite
def _tight(draw: st.DrawFn) -> Problem:
    """Just the memory with which the first of some equal stages has some micro-batches in flight."""
    cluster = draw(clusters())
    stages = draw(st.integers(2, len(cluster.devices())))
    layers, rows = stages * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    work = workload(replace(draw(models()), layers=layers), batch=rows * draw(st.integers(1, 3)))
    plenty = Problem.of(cluster, work)
    cost = SeatCosts(plenty.compute, Pools(plenty.compute.graph)).cost(0, 1, rows)
    held = draw(st.integers(1, stages))
    size = cost.bytes((True, False), layers // stages, held, 1, full=False)
    return Problem.of(with_memory(cluster, math.ceil(size)), work)


@st.composite
def _joined(draw: st.DrawFn) -> Problem:
    """Many layers on two nodes of several devices each, a type or two, which a vendor's collectives join."""
    cluster = draw(clusters())
    each = draw(st.integers(2, 4))

    def native(link: Link) -> Link:
        return replace(link, transport="native")

    groups = tuple(
        replace(
            g,
            nodes=2,
            devices_per_node=each,
            intra_link=native(g.intra_link),
            inter_link=native(g.inter_link),
        )
        for g in cluster.node_groups[:2]
    )
    types = {name: replace(t, vendor="nvidia") for name, t in cluster.device_types.items()}
    cluster = replace(cluster, node_groups=groups, links=cluster.links[: len(groups) - 1], device_types=types)
    cluster = replace(cluster, emulated_time_scale=None)
    model = tiny_model(layers=draw(st.integers(12, 24)))
    return Problem.of(cluster, workload(model, batch=draw(st.integers(4, 12))))


@settings(max_examples=40)
@given(problem=st.one_of(_deep(), _tight(), _joined()))
def test_no_term_of_a_pipeline_is_above_its_price(problem: Problem) -> None:
    """Each by itself, so that none hides behind what another leaves out. Seen to catch, each: updates 5 % or gradients
    20 % too long, a period of few micro-batches that is the one of many (`quick` = `period`), exchanges bounded as if
    no collective joined the holders of a node."""
    for columns, number, tails, setting, chain in _priced(problem, PIPELINES // 2):
        period, quick = columns.period[number], columns.quick[number]
        later = [
            k for k, start in enumerate(SEGMENTS[:-1]) if start * period <= chain.period_seconds * (1 + NEAR)
        ]
        segment = later[-1] if later else 0
        few = setting.micro_batches <= math.ceil(columns.fill[segment, number] / period)
        tail = tails.update[segment, number] + (0.0 if few else tails.gradients[segment, number])
        assert later or few
        assert chain.period_seconds >= quick * (1 - NEAR)
        assert chain.fill_seconds >= columns.fill[segment, number] * (1 - NEAR)
        assert chain.tail_seconds >= tail * (1 - NEAR)


def _priced(problem: Problem, most: int) -> Iterator[tuple[Columns, int, Tails, Setting, Chain]]:
    """About `most` pipelines of a problem that fit, in whatever surroundings, with bounds and prices."""
    chains, space = set_up(problem)
    search = Search(chains, space, problem.workload.global_batch, 1, lambda: False, None)
    columns = search.columns.refined() if len(search.columns) else search.columns
    for number in range(0, len(columns), max(1, len(columns) // most)):
        crew, rows = columns.crew(number), int(columns.rows[number])
        for setting, tails in _settings(search, columns, number):
            chain = chains.chain(crew, rows, setting)
            if chain is not None:
                yield columns, number, tails, setting, chain


def _settings(search: Search, columns: Columns, number: int) -> Iterator[tuple[Setting, Tails]]:
    """As many alike pipelines as there may be, dealt out in both ways; and one beside unlike ones, on all pools, of
    which each is on one node or on all."""
    usage, pools = columns.usage[number], search.space.pools
    copies = int((search.available[usage > 0] // usage[usage > 0]).min())
    own = tuple(pool for pool, used in zip(pools, usage, strict=True) if used)
    others = min(2, int(search.available.sum() - usage.sum()))
    for count in MICRO_BATCHES:
        for alike in sorted({1, copies}):
            tails = columns.tails(*search.rates(columns, (alike,), pools, alike=True))
            near = _near(search.chains, pools, alike * usage)
            for stage_major in (False, True):
                yield Setting(alike, 0, own, count, stage_major, near=near), tails
        if others:
            # holders of a stage are at least the pipelines, and at most the devices
            ends = (1 + others, sum(search.space.available))
            tails = columns.tails(*search.rates(columns, ends, pools, alike=False, must=pools))
            beside = others if len(pools) == 1 else 0
            for near in {(), _near(search.chains, pools, usage + beside)}:
                yield Setting(1, others, pools, count, near=near), tails


def _near(chains: Chains, pools: tuple[int, ...], used: np.ndarray) -> tuple[int, ...]:  # type: ignore[type-arg]
    sizes = [chains.costs.pools[pool].node_size for pool in pools]
    return tuple(pool for pool, size, n in zip(pools, sizes, used, strict=True) if n <= size)
