"""Layers to stages: exact for the slowest stage, and within memory as the cost model counts it."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.memory import device_memory
from hethub.planners.chain import Chains, divide
from hethub.planners.interface import Problem
from hethub.planners.pools import Pools
from hethub.planners.seats import Seat, SeatCosts
from hethub.planners.shares import even_shares
from hethub.planners.stage import Stage
from hethub.planners.steady import round_trips, settle
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, ReplicaPlace, StagePlace
from tests.plan_strategies import models, three_speeds, tiny_model
from tests.planners.examples import with_memory, workload


def _stages(problem: Problem, rows: int) -> list[Stage]:
    """Fast, middle and slow one after the other, a single device each."""
    chains = Chains(SeatCosts(problem.compute, Pools(problem.compute.graph)))
    stages = []
    for place, pool in enumerate(range(len(chains.costs.pools.all))):
        staff = chains.staff((Seat(pool, 1, 1),), rows)
        assert staff is not None
        last = place == len(chains.costs.pools.all) - 1
        stages.append(Stage(staff, first=place == 0, last=last, held=1, holders=1, units=(0, 1)))
    return stages


@settings(max_examples=40)
@given(layers=st.integers(1, 9), memory=st.integers(40, 400), rows=st.integers(1, 3))
def test_the_slowest_stage_is_as_quick_as_enumeration_finds(layers: int, memory: int, rows: int) -> None:
    problem = Problem.of(with_memory(three_speeds(), memory * 1024), workload(tiny_model(layers=layers)))
    stages = _stages(problem, rows)
    least = [0 if s.first or s.last else 1 for s in stages]
    splits = [
        split
        for split in product(range(layers + 1), repeat=len(stages))
        if sum(split) == layers
        and all(low <= n <= s.cap for low, n, s in zip(least, split, stages, strict=True))
    ]
    found = divide(layers, stages)
    if not splits:
        assert found is None
        return
    assert found is not None and tuple(found) in splits

    def slowest(split: tuple[int, ...]) -> float:
        return max(s.seconds(n) for s, n in zip(stages, split, strict=True))

    assert slowest(tuple(found)) == pytest.approx(min(map(slowest, splits)))


@settings(max_examples=40)
@given(
    model=models(),
    degree=st.sampled_from([1, 2]),
    rows=st.integers(1, 3),
    held=st.integers(1, 4),
    recompute=st.sampled_from(["none", "full"]),
    place=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_bytes_are_those_of_the_cost_model(model, degree, rows, held, recompute, place, data) -> None:  # type: ignore[no-untyped-def]
    if degree > model.kv_heads:
        return
    problem = Problem.of(three_speeds(), workload(model))
    cost = SeatCosts(problem.compute, Pools(problem.compute.graph)).cost(0, degree, rows)
    first, last = place
    decoders = model.layers if all(place) else data.draw(st.integers(1, model.layers))
    start = 0 if first else model.layers + 1 - decoders if last else 1
    layers = (start, model.layers + 2 if last else decoders + 1)
    ranks = tuple(RankPlace(d, share) for d, share in enumerate(even_shares(model, degree)))
    stage = StagePlace(0, layers, recompute, held, (ReplicaPlace((0, rows), ranks),))
    layout = Layout(model, (PipelinePlace(0, "1f1b", held, rows, 0, (stage,)),))
    expected = device_memory(problem.compute, layout)[0].total
    assert cost.bytes(place, decoders, held, 1, full=recompute == "full") == pytest.approx(expected)
    assert cost.most_decoders(place, held, 1, full=recompute == "full") >= decoders


def test_without_hops_the_steady_state_holds_what_1f1b_holds() -> None:
    times = [1.0] * 4
    period, in_flight = settle(times, round_trips(times, [0.0] * 3), [9] * 4, 100, 0.0)
    assert period == 1.0
    assert in_flight == [4, 3, 2, 1]


def test_long_hops_ask_for_more_in_flight_and_little_memory_for_time() -> None:
    times = [1.0] * 3
    trips = round_trips(times, [1.0] * 2)
    assert settle(times, trips, [99] * 3, 100, 0.0) == (1.0, [5, 3, 1])
    period, in_flight = settle(times, trips, [3, 2, 1], 100, 0.0)
    # three stages and both hops, while three micro-batches pass
    assert period == pytest.approx(5 / 3, rel=0.01)
    assert in_flight == [3, 2, 1]
