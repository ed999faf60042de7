"""Schedules: one total order of all work that respects every dependence and the memory limits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.program.schedules import SCHEDULES, Shape, Task, forward_only
from hethub.timeline.record import Kind

SECONDS = st.sampled_from([0.0, 1.0, 1.5, 4.0])


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    stages, micro_batches = draw(st.integers(1, 5)), draw(st.integers(1, 6))

    def each(strategy: st.SearchStrategy[float], count: int) -> tuple[float, ...]:
        return tuple(draw(strategy) for _ in range(count))

    inputs, weights = each(SECONDS, stages), each(SECONDS, stages)
    return Shape(
        micro_batches=micro_batches,
        forward_seconds=each(SECONDS, stages),
        backward_seconds=tuple(map(sum, zip(inputs, weights, strict=True))),
        input_seconds=inputs,
        weight_seconds=weights,
        hop_seconds=each(SECONDS, stages - 1),
        in_flight=tuple(draw(st.integers(1, micro_batches)) for _ in range(stages)),
        resources=tuple(draw(st.integers(0, stage)) for stage in range(stages)),
    )


def check_dependences(order: list[Task], stages: int) -> None:
    done: set[Task] = set()
    for kind, stage, micro_batch in order:
        if kind == Kind.FORWARD:
            assert stage == 0 or Task(kind, stage - 1, micro_batch) in done
        else:
            assert Task(Kind.FORWARD, stage, micro_batch) in done
            assert stage == stages - 1 or Task(kind, stage + 1, micro_batch) in done
        done.add(Task(kind, stage, micro_batch))


def most_held(order: list[Task], stage: int) -> int:
    held = most = 0
    for task in order:
        if task.stage == stage:
            held += 1 if task.kind == Kind.FORWARD else -1
            most = max(most, held)
    return most


@settings(max_examples=200, deadline=None)
@given(shape=shapes(), name=st.sampled_from(sorted(SCHEDULES)))
def test_every_piece_of_work_stands_once_after_what_it_needs(shape: Shape, name: str) -> None:
    order = SCHEDULES[name](shape)
    stages = len(shape.forward_seconds)
    kinds = (Kind.FORWARD, Kind.BACKWARD)
    assert sorted(order) == sorted(
        Task(kind, stage, m) for kind in kinds for stage in range(stages) for m in range(shape.micro_batches)
    )
    check_dependences(order, stages)


@settings(max_examples=200, deadline=None)
@given(shape=shapes())
def test_1f1b_never_holds_more_than_the_limit(shape: Shape) -> None:
    order = SCHEDULES["1f1b"](shape)
    for stage, limit in enumerate(shape.in_flight):
        assert most_held(order, stage) <= limit


@settings(max_examples=50, deadline=None)
@given(shape=shapes())
def test_evaluation_only_goes_forward(shape: Shape) -> None:
    order = forward_only(shape)
    assert {task.kind for task in order} == {Kind.FORWARD}
    assert len(order) == len(set(order)) == len(shape.forward_seconds) * shape.micro_batches
    check_dependences(order, len(shape.forward_seconds))


@pytest.mark.parametrize("stages", [2, 4])
def test_1f1b_of_alike_stages_is_the_textbook_schedule(stages: int) -> None:
    """Warm-up of stages - s forwards, then one backward, one forward in turn."""
    count = 8
    shape = Shape(
        micro_batches=count,
        forward_seconds=(1.0,) * stages,
        backward_seconds=(2.0,) * stages,
        input_seconds=(1.0,) * stages,
        weight_seconds=(1.0,) * stages,
        hop_seconds=(0.0,) * (stages - 1),
        in_flight=tuple(stages - s for s in range(stages)),
        resources=tuple(range(stages)),
    )
    order = SCHEDULES["1f1b"](shape)
    for stage in range(stages):
        warm = stages - stage
        kinds = [task.kind for task in order if task.stage == stage]
        steady = [Kind.BACKWARD, Kind.FORWARD] * (count - warm)
        assert kinds == [Kind.FORWARD] * warm + steady + [Kind.BACKWARD] * warm
