"""Where the training is cut for evaluations."""

from __future__ import annotations

import pytest

from hethub.launch.session import _segments


@pytest.mark.parametrize(
    ("first", "steps", "every", "expected"),
    [
        (0, 6, 0, [(0, 6)]),
        (0, 6, 3, [(0, 3), (3, 6)]),
        (0, 7, 3, [(0, 3), (3, 6), (6, 7)]),
        (4, 7, 3, [(4, 6), (6, 7)]),  # a run that goes on evaluates after the same steps
        (6, 7, 3, [(6, 7)]),
        (5, 5, 3, []),
    ],
)
def test_a_run_is_evaluated_after_the_same_steps_wherever_it_begins(first, steps, every, expected) -> None:
    assert _segments(first, steps, every) == expected
