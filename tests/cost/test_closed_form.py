"""The closed form against the simulator, and against sums that a person can do."""

from __future__ import annotations

import numpy as np
import pytest

from hethub.cost.closed_form import Splits, fixed_order, step_seconds
from hethub.simulate.kernel import COMPUTE, RECEIVE, SEND, Rules
from tests.simulate.test_kernel import Lists, Messages, run


def splits(
    forward: list[float], backward: list[float], *, transfer: float = 0.0, latency: float = 0.0
) -> Splits:
    stages = len(forward)
    hops = np.ones((1, stages - 1))
    return Splits(
        forward=np.array([forward]),
        backward=np.array([backward]),
        transfer=transfer * hops,
        latency=latency * hops,
        reduce=np.zeros((1, stages)),
        update=np.zeros((1, stages)),
    )


def test_equal_stages_take_the_textbooks_time() -> None:
    found = step_seconds(splits([1.0] * 4, [2.0] * 4), [4, 3, 2, 1], 8)
    assert found == pytest.approx([(8 + 4 - 1) * 3.0])


def test_one_micro_batch_goes_there_and_back() -> None:
    found = step_seconds(splits([1.0, 2.0], [3.0, 4.0], transfer=0.5, latency=0.25), [2, 1], 1)
    assert found == pytest.approx([10.0 + 2 * 0.75])


def test_a_slow_link_sets_the_period() -> None:
    found = step_seconds(splits([1.0, 1.0], [1.0, 1.0], transfer=5.0), [100, 1], 100)
    assert found[0] == pytest.approx(100 * 5.0 + 1 + 2 + 5 + 1, rel=0.01)


def test_the_update_waits_for_all_sums() -> None:
    one = splits([1.0, 1.0], [1.0, 1.0])
    later = Splits(
        **{f: getattr(one, f) for f in ("forward", "backward", "transfer", "latency")},
        reduce=np.array([[0.5, 4.0]]),
        update=np.array([[0.2, 0.1]]),
    )
    assert step_seconds(later, [2, 1], 1) == pytest.approx([3.0 + 4.0 + 0.2])


@pytest.mark.parametrize("in_flight", [[1, 2], [0], [2, 0]])
def test_an_order_without_an_end_is_refused(in_flight: list[int]) -> None:
    with pytest.raises(ValueError, match="not rise from stage to stage"):
        fixed_order(in_flight, 4)


def simulated(one: Splits, row: int, in_flight: list[int], micro_batches: int) -> float:
    """The event loop over the same fixed order, a device for each stage and a cell for each link's way."""
    stages = one.forward.shape[1]
    lists: Lists = [[] for _ in range(stages)]
    messages: Messages = []
    numbers: dict[tuple[bool, int, int], int] = {}
    for backward, stage, micro_batch in fixed_order(in_flight, micro_batches):
        if (backward, stage, micro_batch) in numbers:
            lists[stage].append((RECEIVE, numbers[backward, stage, micro_batch]))
        lists[stage].append((COMPUTE, 2 * stage + backward))
        target, boundary = (stage - 1, stage - 1) if backward else (stage + 1, stage)
        if 0 <= target < stages:
            numbers[backward, target, micro_batch] = len(messages)
            lists[stage].append((SEND, len(messages)))
            messages.append((stage, target, float(one.transfer[row, boundary]), [2 * boundary + backward]))
    for stage in range(stages):
        lists[stage].append((COMPUTE, 2 * stages + stage))
    seconds = [float(times[row, s]) for s in range(stages) for times in (one.forward, one.backward)]
    seconds += one.reduce[row].tolist()
    latencies = [float(one.latency[row, message[3][0] // 2]) for message in messages]
    _, state = run(lists, messages, [1.0] * 2 * stages, Rules(), seconds, latencies=latencies)
    return max(state.ends) + float(one.update[row].max())


@pytest.mark.parametrize("seed", range(40))
def test_agrees_with_the_simulator_on_random_splits(seed: int) -> None:
    """2000 splits in all: unequal stages, links slower and faster than compute, few and many micro-batches.

    Seeded bugs it caught: the link not held while it carries a message; a circuit's hops counted one way only.
    """
    random = np.random.default_rng(seed)
    count, stages, micro_batches = 50, int(random.integers(1, 9)), int(random.integers(1, 161))
    slow = float(random.choice([0.01, 0.1, 1.0, 4.0]))
    in_flight = [stages - stage + int(random.integers(0, 2)) for stage in range(stages)]
    in_flight = np.minimum.accumulate(in_flight).tolist()

    def times(width: int, mean: float) -> np.ndarray:
        return mean * np.exp(random.normal(0.0, 0.4, (count, width)))

    one = Splits(
        forward=times(stages, 1.0),
        backward=times(stages, 2.0),
        transfer=times(stages - 1, slow),
        latency=times(stages - 1, slow / 10),
        reduce=times(stages, 1.0),
        update=times(stages, 0.2),
    )
    found = step_seconds(one, in_flight, micro_batches)
    expected = [simulated(one, row, in_flight, micro_batches) for row in range(count)]
    assert found == pytest.approx(expected, rel=0.02)
