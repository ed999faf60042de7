"""Our small simplex against HiGHS."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from hethub.cost.linear_program import Infeasible, Unbounded, minimize

Rows = list[tuple[list[float], float]]


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[float], Rows, Rows]:
    """Small integers, so that bases are often degenerate and constraints often redundant."""
    width = draw(st.integers(1, 5))
    number = st.integers(-4, 4).map(float)
    row = st.tuples(st.lists(number, min_size=width, max_size=width), st.integers(-6, 9).map(float))
    cost = draw(st.lists(number, min_size=width, max_size=width))
    return cost, draw(st.lists(row, max_size=5)), draw(st.lists(row, max_size=3))


@settings(max_examples=300)
@given(program=programs())
def test_the_value_is_that_of_highs(program: tuple[list[float], Rows, Rows]) -> None:
    cost, at_most, equal = program
    judge = linprog(
        cost,
        A_ub=[row for row, _ in at_most] or None,
        b_ub=[bound for _, bound in at_most] or None,
        A_eq=[row for row, _ in equal] or None,
        b_eq=[bound for _, bound in equal] or None,
        method="highs",
    )
    try:
        found = minimize(cost, at_most=at_most, equal=equal)
    except (Infeasible, Unbounded):
        assert judge.status in (2, 3, 4)  # infeasible, unbounded, or one of them
        return
    assert judge.status == 0
    assert found.value == pytest.approx(judge.fun, abs=1e-7)
    assert min(found.x) >= 0.0
    for row, bound in at_most:
        assert sum(a * x for a, x in zip(row, found.x, strict=True)) <= bound + 1e-7
    for row, bound in equal:
        assert sum(a * x for a, x in zip(row, found.x, strict=True)) == pytest.approx(bound, abs=1e-7)


def test_contradiction_and_a_bottomless_objective_are_told_apart() -> None:
    with pytest.raises(Infeasible):
        minimize([1.0], at_most=[([1.0], 1.0)], equal=[([1.0], 2.0)])
    with pytest.raises(Unbounded):
        minimize([-1.0, 0.0], at_most=[([0.0, 1.0], 1.0)])
