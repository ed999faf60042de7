"""A small dense simplex, in plain Python.

The physical bound needs a linear program of a dozen variables. scipy's HiGHS alone would take half of the
start-up budget of `hethub plan` (0.5 s for the whole process), and a tableau this small is solved in well
under a millisecond; the tests hold it against HiGHS on random instances. Not meant for more than a few
hundred variables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Infeasible", "LinearSolution", "Unbounded", "minimize"]

_TINY = 1e-11  # below this a reduced cost or a pivot counts as zero; callers scale their rows to about 1


class Infeasible(ValueError):  # noqa: N818 - the name says what the program is
    """No point satisfies the constraints."""


class Unbounded(ValueError):  # noqa: N818
    """The objective has no minimum."""


@dataclass(frozen=True, slots=True)
class LinearSolution:
    """The least `value` and a point `x` that has it."""

    value: float
    x: tuple[float, ...]


def minimize(
    cost: Sequence[float],
    *,
    at_most: Sequence[tuple[Sequence[float], float]] = (),
    equal: Sequence[tuple[Sequence[float], float]] = (),
) -> LinearSolution:
    """Minimize cost . x over x >= 0 with row . x <= bound (`at_most`) and row . x = bound (`equal`).

    Two phases, Bland's rule against cycling (Bland, "New finite pivoting rules for the simplex method",
    Mathematics of Operations Research 2(2), 1977). Raises Infeasible or Unbounded.
    """
    tableau = _Tableau(len(cost), at_most, equal)
    tableau.drive_out_artificials()
    tableau.optimize(cost, tableau.real)
    x = [0.0] * len(cost)
    for row, variable in enumerate(tableau.basis):
        if variable < len(cost):
            x[variable] = max(0.0, tableau.rows[row][-1])
    return LinearSolution(sum(c * v for c, v in zip(cost, x, strict=True)), tuple(x))


class _Tableau:
    """Rows [coefficients | right side] with one basic variable each: variables, then slacks, then
    artificials."""

    def __init__(
        self,
        variables: int,
        at_most: Sequence[tuple[Sequence[float], float]],
        equal: Sequence[tuple[Sequence[float], float]],
    ) -> None:
        count = len(at_most) + len(equal)
        self.real = variables + len(at_most)
        self.width = self.real + count
        self.rows: list[list[float]] = []
        self.basis = [self.real + i for i in range(count)]
        for number, (coefficients, bound) in enumerate([*at_most, *equal]):
            row = [*coefficients, *([0.0] * (self.width - variables)), bound]
            if number < len(at_most):
                row[variables + number] = 1.0
            if bound < 0:
                row = [-value for value in row]
            row[self.real + number] = 1.0
            self.rows.append(row)

    def drive_out_artificials(self) -> None:
        """Phase one: a feasible basis of real variables; rows that say nothing are dropped."""
        scale = max([1.0, *(row[-1] for row in self.rows)])
        left = self.optimize([0.0] * self.real + [1.0] * (self.width - self.real), self.width)
        if left > 1e-9 * scale:
            raise Infeasible("the constraints contradict each other")
        for number in reversed(range(len(self.rows))):
            if self.basis[number] < self.real:
                continue
            row = self.rows[number]
            column = max(range(self.real), key=lambda j, row=row: abs(row[j]), default=-1)  # type: ignore[misc]
            if column >= 0 and abs(row[column]) > _TINY:
                self.pivot(number, column)
            else:
                del self.rows[number], self.basis[number]

    def optimize(self, cost: Sequence[float], columns: int) -> float:
        """Pivot until no column below `columns` improves `cost`; returns its value."""
        full = [*cost, *([0.0] * (self.width - len(cost)))]
        while True:
            prices = [full[variable] for variable in self.basis]
            entering = self._entering(full, prices, columns)
            if entering < 0:
                return sum(p * row[-1] for p, row in zip(prices, self.rows, strict=True))
            self.pivot(self._leaving(entering), entering)

    def _entering(self, cost: list[float], prices: list[float], columns: int) -> int:
        """The first column whose reduced cost is negative, or -1."""
        for column in range(columns):
            gain = cost[column] - sum(p * row[column] for p, row in zip(prices, self.rows, strict=True))
            if gain < -_TINY:
                return column
        return -1

    def _leaving(self, column: int) -> int:
        """The row of the least ratio, of equals the one whose variable comes first."""
        ratios = [
            (row[-1] / row[column], self.basis[number], number)
            for number, row in enumerate(self.rows)
            if row[column] > _TINY
        ]
        if not ratios:
            raise Unbounded("the objective falls without limit")
        return min(ratios)[2]

    def pivot(self, number: int, column: int) -> None:
        """Make `column` basic in row `number`."""
        pivot = self.rows[number][column]
        self.rows[number] = chosen = [value / pivot for value in self.rows[number]]
        self.basis[number] = column
        for other, row in enumerate(self.rows):
            factor = row[column]
            if other != number and factor != 0.0:
                self.rows[other] = [a - factor * b for a, b in zip(row, chosen, strict=True)]
