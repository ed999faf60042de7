"""Schedules: one total order of all work that respects every dependence and the memory limits.

Seeded bugs that were tried, and the test that saw each: the in-flight slot freed at the input part (the limit);
zb-h1 with backwards before forwards (the published bubble); interleaved going ahead by one step for each stage behind
(Megatron's order) or without a look at the limit (the limit); backwards left whole without a look at when their
gradient is needed (never longer than 1F1B and ZB-H1); weight parts of split 1F1B last, as ZB-H1 has them (right behind
their input parts); 1F1B in one order only, backwards first (in step over slow hops).
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.program.orders import Shape, Task, makespan, timed
from hethub.program.schedules import SCHEDULES, forward_only
from hethub.timeline.record import Kind

SECONDS = st.sampled_from([0.0, 1.0, 1.5, 4.0])
NAMES = sorted(SCHEDULES)


@st.composite
def shapes(draw: st.DrawFn, name: str = "") -> Shape:
    """Up to 6 unequal stages on any resources, any limits (gpipe: all micro-batches), splitting free or at a cost."""
    stages, micro_batches = draw(st.integers(1, 6)), draw(st.integers(1, 8))

    def each(strategy: st.SearchStrategy[float], count: int) -> tuple[float, ...]:
        return tuple(draw(strategy) for _ in range(count))

    inputs, weights = each(SECONDS, stages), each(SECONDS, stages)
    share = draw(st.sampled_from([1.0, 0.9]))
    limits = st.just(micro_batches) if name == "gpipe" else st.integers(1, micro_batches)
    return Shape(
        micro_batches=micro_batches,
        forward_seconds=each(SECONDS, stages),
        backward_seconds=tuple(share * (i + w) for i, w in zip(inputs, weights, strict=True)),
        input_seconds=inputs,
        weight_seconds=weights,
        hop_seconds=each(SECONDS, stages - 1),
        in_flight=tuple(draw(limits) for _ in range(stages)),
        resources=tuple(draw(st.integers(0, stage)) for stage in range(stages)),
    )


def equal_stages(
    resources: tuple[int, ...],
    micro_batches: int,
    *,
    forward: float = 1.0,
    input_: float = 1.0,
    weight: float = 1.0,
    in_flight: tuple[int, ...] = (),
) -> Shape:
    """Equal stages without hops; every micro-batch may be held unless limits are given."""
    stages = len(resources)
    return Shape(
        micro_batches=micro_batches,
        forward_seconds=(forward,) * stages,
        backward_seconds=(input_ + weight,) * stages,
        input_seconds=(input_,) * stages,
        weight_seconds=(weight,) * stages,
        hop_seconds=(0.0,) * (stages - 1),
        in_flight=in_flight or (micro_batches,) * stages,
        resources=resources,
    )


def of_resource(order: list[Task], shape: Shape, resource: int) -> list[Task]:
    return [task for task in order if shape.resources[task.stage] == resource]


# -- every schedule ------------------------------------------------------------------------------------------

BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)


def check_dependences(order: list[Task], stages: int) -> None:
    """Counts for itself what is done: (is it a backward?, stage, micro-batch)."""
    done: set[tuple[bool, int, int]] = set()
    for kind, stage, micro_batch in order:
        if kind == Kind.FORWARD:
            assert stage == 0 or (False, stage - 1, micro_batch) in done
            done.add((False, stage, micro_batch))
        elif kind == Kind.BACKWARD_WEIGHT:
            assert (True, stage, micro_batch) in done
        else:
            assert (False, stage, micro_batch) in done
            assert stage == stages - 1 or (True, stage + 1, micro_batch) in done
            done.add((True, stage, micro_batch))


def most_held(order: list[Task], stage: int) -> int:
    """Held from the forward to the whole backward or the weight part."""
    held = most = 0
    for task in order:
        if task.stage == stage and task.kind != Kind.BACKWARD_INPUT:
            held += 1 if task.kind == Kind.FORWARD else -1
            most = max(most, held)
    return most


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(data=st.data())
def test_every_piece_of_work_stands_once_after_what_it_needs(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(name))
    order = SCHEDULES[name](shape)
    stages = len(shape.resources)
    kinds: dict[tuple[int, int], list[Kind]] = {}
    for kind, stage, micro_batch in order:
        kinds.setdefault((stage, micro_batch), []).append(kind)
    assert set(kinds) == {(stage, m) for stage in range(stages) for m in range(shape.micro_batches)}
    whole, split = [Kind.FORWARD, Kind.BACKWARD], [Kind.FORWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT]
    assert all(found in (whole, split) for found in kinds.values())
    check_dependences(order, stages)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100)
@given(data=st.data())
def test_no_stage_holds_more_than_its_limit(name: str, data: st.DataObject) -> None:
    shape = data.draw(shapes(name))
    order = SCHEDULES[name](shape)
    for stage, limit in enumerate(shape.in_flight):
        assert most_held(order, stage) <= limit


@settings(max_examples=50)
@given(shape=shapes())
def test_evaluation_only_goes_forward(shape: Shape) -> None:
    order = forward_only(shape)
    assert {task.kind for task in order} == {Kind.FORWARD}
    assert len(order) == len(set(order)) == len(shape.forward_seconds) * shape.micro_batches
    check_dependences(order, len(shape.forward_seconds))


# -- predicted time ------------------------------------------------------------------------------------------


def test_an_order_takes_its_work_and_its_hops() -> None:
    shape = replace(equal_stages((0, 1), 1), hop_seconds=(0.25,))
    tasks = [Task(Kind.FORWARD, 0, 0), Task(Kind.FORWARD, 1, 0)]
    tasks += [Task(Kind.BACKWARD_INPUT, 1, 0), Task(Kind.BACKWARD_WEIGHT, 1, 0), Task(Kind.BACKWARD, 0, 0)]
    assert timed(tasks, shape) == [(0, 1), (1.25, 2.25), (2.25, 3.25), (3.25, 4.25), (3.5, 5.5)]
    assert makespan(tasks, shape) == 5.5
    assert makespan(tasks, replace(shape, resources=(0, 0))) == 6.0  # one device, so no hop, but in turn


def test_work_before_what_it_needs_is_refused() -> None:
    with pytest.raises(ValueError, match="BACKWARD of stage 0, micro-batch 0 stands before what it needs"):
        makespan([Task(Kind.FORWARD, 0, 0), Task(Kind.BACKWARD, 0, 0)], equal_stages((0, 1), 1))


# -- the textbooks' ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", ["1f1b", "interleaved"])
def test_1f1b_of_alike_stages_is_the_textbook_schedule(stages: int, name: str) -> None:
    """Warm-up of stages - s forwards, then one backward, one forward in turn; also interleaved without chunks."""
    count = 8
    limits = tuple(stages - s for s in range(stages))
    order = SCHEDULES[name](equal_stages(tuple(range(stages)), count, in_flight=limits))
    for stage in range(stages):
        warm = stages - stage
        kinds = [task.kind for task in order if task.stage == stage]
        steady = [Kind.BACKWARD, Kind.FORWARD] * (count - warm)
        assert kinds == [Kind.FORWARD] * warm + steady + [Kind.BACKWARD] * warm


def megatron(devices: int, chunks: int, micro_batches: int, rank: int) -> list[Task]:
    """Megatron-LM's interleaved 1F1B on one rank, by its own arithmetic on virtual micro-batch numbers
    (forward_backward_pipelining_with_interleaving; micro-batches are a multiple of the devices)."""
    total = micro_batches * chunks

    def task(kind: Kind, virtual: int) -> Task:
        in_group = virtual % (devices * chunks)
        chunk = in_group // devices
        if kind == Kind.BACKWARD:
            chunk = chunks - 1 - chunk
        micro_batch = virtual // (devices * chunks) * devices + in_group % devices
        return Task(kind, chunk * devices + rank, micro_batch)

    warm_up = min((devices - rank - 1) * 2 + (chunks - 1) * devices, total)
    order = [task(Kind.FORWARD, v) for v in range(warm_up)]
    for v in range(total - warm_up):
        order += [task(Kind.FORWARD, v + warm_up), task(Kind.BACKWARD, v)]
    return order + [task(Kind.BACKWARD, v) for v in range(total - warm_up, total)]


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_interleaved_of_alike_stages_is_megatrons(devices: int, chunks: int, groups: int) -> None:
    shape = equal_stages(tuple(range(devices)) * chunks, groups * devices)
    order = SCHEDULES["interleaved"](shape)
    for rank in range(devices):
        assert of_resource(order, shape, rank) == megatron(devices, chunks, groups * devices, rank)
    # the published bubble is (p - 1) / (m v) of the work, m v (F + B)
    work = groups * devices * chunks * 3.0
    assert makespan(order, shape) - work == (devices - 1) * 3.0


@pytest.mark.parametrize("resources", [(0, 1, 0), (0, 1, 1, 0), (0, 1, 2, 0, 1), (0, 1, 2, 3, 4, 5, 6, 6, 6)])
def test_interleaved_runs_unequal_chunks_within_any_limit(resources: tuple[int, ...]) -> None:
    """Fewer held micro-batches never deadlock, and cost no more than doing one micro-batch after the other."""
    shape = equal_stages(resources, 12)
    times = []
    for limit in (12, 3, 2, 1):
        tight = replace(shape, in_flight=(limit,) * len(resources))
        order = SCHEDULES["interleaved"](tight)
        assert max(most_held(order, stage) for stage in range(len(resources))) <= limit
        times.append(makespan(order, tight))
    assert times[0] <= times[-1] <= 12 * 3.0 * len(resources)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 3.5])
def test_zb_h1_has_the_published_bubble_within_1f1bs_peak(stages: int, rounds: float) -> None:
    """Table 1 of arXiv 2401.10241: (p - 1)(F + B - W) instead of (p - 1)(F + B + W)."""
    count = math.ceil(rounds * stages)
    shape = equal_stages(tuple(range(stages)), count, in_flight=(min(stages, count),) * stages)
    assert makespan(SCHEDULES["1f1b"](shape), shape) == 3 * count + 3 * (stages - 1)
    order = SCHEDULES["zb-h1"](shape)
    assert makespan(order, shape) == 3 * count + (stages - 1)
    assert max(most_held(order, stage) for stage in range(stages)) == stages


# -- 1F1B of unequal stages, whole and split ----------------------------------------------------------------------


def test_1f1b_keeps_in_step_over_slow_hops() -> None:
    """As planned for 768 devices: 16 stages, a slow hop, and six stages of other lengths. A step takes the fill and the
    slowest stage's work of the other micro-batches. Backwards first alone took 17 % more."""
    forward = (0.0779,) * 16 + (0.0771,) * 4 + (0.0514, 0.0736)
    backward = (0.1455,) * 16 + (0.15,) * 4 + (0.1, 0.1)
    shape = Shape(
        micro_batches=154,
        forward_seconds=forward,
        backward_seconds=backward,
        input_seconds=tuple(0.58 * b for b in backward),
        weight_seconds=tuple(0.42 * b for b in backward),
        hop_seconds=(0.0001,) * 15 + (0.00139, 0.00035, 0.00035, 0.00035, 0.00136, 0.00035),
        in_flight=(*range(23, 7, -1), 6, 5, 4, 3, 2, 1),
        resources=tuple(range(22)),
    )
    fill = sum(forward) + sum(backward) + 2 * sum(shape.hop_seconds)
    assert makespan(SCHEDULES["1f1b"](shape), shape) <= 1.01 * (fill + 153 * (0.0771 + 0.15))


@settings(max_examples=100)
@given(shape=shapes())
def test_split_1f1b_has_every_weight_part_right_behind_its_input_part(shape: Shape) -> None:
    order = SCHEDULES["1f1b-split"](shape)
    for resource in set(shape.resources):
        own = of_resource(order, shape, resource)
        for at, task in enumerate(own):
            if task.kind == Kind.BACKWARD_INPUT:
                assert own[at + 1] == Task(Kind.BACKWARD_WEIGHT, task.stage, task.micro_batch)
            assert task.kind != Kind.BACKWARD


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_split_1f1b_waits_for_no_weight_part_on_the_way_back(stages: int) -> None:
    """The bubble is (p - 1)(F + B) instead of (p - 1)(F + B + W), with as many in flight as 1F1B."""
    limits = tuple(stages - s for s in range(stages))
    shape = equal_stages(tuple(range(stages)), 3 * stages, in_flight=limits)
    assert makespan(SCHEDULES["1f1b-split"](shape), shape) == 9 * stages + 2 * (stages - 1)


# -- list scheduling -----------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(shape=shapes())
def test_list_is_never_longer_than_1f1b_and_zb_h1(shape: Shape) -> None:
    found = makespan(SCHEDULES["list"](shape), shape)
    assert found <= min(makespan(SCHEDULES[name](shape), shape) for name in ("1f1b", "1f1b-split", "zb-h1"))


def test_list_splits_no_backward_where_that_gains_nothing() -> None:
    alone = equal_stages((0,), 6, in_flight=(2,))
    assert {task.kind for task in SCHEDULES["list"](alone)} == {Kind.FORWARD, Kind.BACKWARD}


def test_list_splits_only_where_it_fills_a_bubble() -> None:
    """Splitting costs 3 %, so the many micro-batches in the middle stay whole."""
    limits = (12, 11, 10, 9)
    shape = equal_stages((0, 1, 2, 3), 64, in_flight=limits)
    shape = replace(shape, backward_seconds=(1.94,) * 4)
    order = SCHEDULES["list"](shape)
    kinds = Counter(task.kind for task in order)
    assert 0 < kinds[Kind.BACKWARD_INPUT] < 0.2 * kinds[Kind.BACKWARD]
    # less than half of 1F1B's bubble is left
    work = 64 * 2.94
    assert makespan(order, shape) - work < 0.5 * (makespan(SCHEDULES["1f1b"](shape), shape) - work)


class State(NamedTuple):
    """A beginning of an order: counts by stage, free times of resources, arrivals not used yet by stage."""

    forwards: tuple[int, ...]
    backwards: tuple[int, ...]
    freed: tuple[int, ...]
    free: tuple[float, ...]
    arrivals: tuple[tuple[float, ...], ...]  # of the forwards of each stage, then of the backwards


def changed(values: tuple, at: int, value: object) -> tuple:
    return (*values[:at], value, *values[at + 1 :])


def next_states(state: State, shape: Shape) -> Iterator[State]:
    """All beginnings that are one task longer. Micro-batches are alike, so each stage takes them in order."""
    stages, hops = len(shape.resources), shape.hops()
    for stage in range(stages):
        resource = shape.resources[stage]
        free = state.free[resource]
        if state.arrivals[stage] and state.forwards[stage] - state.freed[stage] < shape.in_flight[stage]:
            end = max(free, state.arrivals[stage][0]) + shape.forward_seconds[stage]
            left = changed(state.arrivals, stage, state.arrivals[stage][1:])
            to, hop = (stages + stage, 0.0) if stage == stages - 1 else (stage + 1, hops[stage])
            yield state._replace(
                forwards=changed(state.forwards, stage, state.forwards[stage] + 1),
                free=changed(state.free, resource, end),
                arrivals=changed(left, to, (*left[to], end + hop)),
            )
        at = stages + stage
        for whole in (True, False) if state.arrivals[at] else ():
            seconds = (shape.backward_seconds if whole else shape.input_seconds)[stage]
            end = max(free, state.arrivals[at][0]) + seconds
            arrivals = changed(state.arrivals, at, state.arrivals[at][1:])
            if stage:
                arrivals = changed(arrivals, at - 1, (*arrivals[at - 1], end + hops[stage - 1]))
            yield state._replace(
                backwards=changed(state.backwards, stage, state.backwards[stage] + 1),
                freed=changed(state.freed, stage, state.freed[stage] + whole),
                free=changed(state.free, resource, end),
                arrivals=arrivals,
            )
        if state.freed[stage] < state.backwards[stage]:
            yield state._replace(
                freed=changed(state.freed, stage, state.freed[stage] + 1),
                free=changed(state.free, resource, free + shape.weight_seconds[stage]),
            )


def least_seconds(state: State, shape: Shape) -> float:
    """No end of this beginning is sooner: every resource still has its work to do."""
    done = list(state.free)
    for stage, resource in enumerate(shape.resources):
        whole = min(shape.backward_seconds[stage], shape.input_seconds[stage] + shape.weight_seconds[stage])
        done[resource] += (shape.micro_batches - state.forwards[stage]) * shape.forward_seconds[stage]
        done[resource] += (shape.micro_batches - state.backwards[stage]) * whole
        done[resource] += (state.backwards[stage] - state.freed[stage]) * shape.weight_seconds[stage]
    return max(done)


def optimum(shape: Shape, upper: float) -> float:
    """The least makespan of all feasible orders, or `upper` where none is shorter.

    Breadth first over all beginnings; of those with equal counts, one that is nowhere earlier than another is left out.
    """
    stages, count = len(shape.resources), shape.micro_batches
    none = (0,) * stages
    arrivals = ((0.0,) * count, *[()] * (2 * stages - 1))
    level = [State(none, none, none, (0.0,) * stages, arrivals)]
    best = upper
    while level:
        fronts: dict[object, list[tuple[tuple[float, ...], State]]] = {}
        for state in level:
            if state.freed == (count,) * stages:
                best = min(best, max(state.free))
                continue
            for longer in next_states(state, shape):
                if least_seconds(longer, shape) >= best - 1e-9:
                    continue
                times = (*longer.free, *(t for queue in longer.arrivals for t in queue))
                front = fronts.setdefault(longer[:3], [])
                if not any(all(map(float.__le__, other, times)) for other, _ in front):
                    front[:] = [e for e in front if not all(map(float.__le__, times, e[0]))]
                    front.append((times, longer))
        level = [state for front in fronts.values() for _, state in front]
    return best


def small_shape(draw: random.Random) -> Shape:
    """2 or 3 stages, 2 or 3 micro-batches; on devices of their own or not; splitting free or at 5 %."""
    stages, count = draw.choice([2, 3]), draw.choice([2, 3])

    def times(least: float, number: int = stages) -> tuple[float, ...]:
        return tuple(draw.choice([least, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]) for _ in range(number))

    inputs, weights, share = times(1.0), times(1.0), draw.choice([1.0, 0.95])
    apart = draw.random() < 0.7
    return Shape(
        micro_batches=count,
        forward_seconds=times(1.0),
        backward_seconds=tuple(share * (i + w) for i, w in zip(inputs, weights, strict=True)),
        input_seconds=inputs,
        weight_seconds=weights,
        hop_seconds=times(0.0, stages - 1),
        in_flight=tuple(draw.randint(1, count) for _ in range(stages)),
        resources=tuple(stage if apart else draw.randint(0, stage) for stage in range(stages)),
    )


def test_list_is_at_most_a_tenth_and_mostly_nothing_over_the_optimum() -> None:
    """Over all feasible orders, whole and split mixed at will."""
    draw = random.Random(4)
    over = []
    for _ in range(120):
        shape = small_shape(draw)
        found = makespan(SCHEDULES["list"](shape), shape)
        over.append(found / optimum(shape, found))
    assert max(over) <= 1.10
    assert sum(ratio < 1 + 1e-9 for ratio in over) >= 0.85 * len(over)
