"""The most rows that any choice of columns does with so many devices."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.planners.master import Counted


@settings(max_examples=150)
@given(data=st.data())
def test_rows_by_counts_are_those_of_the_best_choice(data: st.DataObject) -> None:
    """Against taking one column after the other in every way. Seen to catch: two of a column counted as doing the rows
    of one; of columns that use the same the first one taken, not the best."""
    pools = data.draw(st.integers(1, 3))
    available = data.draw(st.lists(st.integers(0, 4), min_size=pools, max_size=pools))
    used = st.tuples(*[st.integers(0, 3)] * pools).filter(any)
    columns = data.draw(st.lists(st.tuples(used, st.integers(0, 9)), max_size=6))
    best: dict[tuple[int, ...], int] = {}
    for counts in product(
        *(range(count + 1) for count in available)
    ):  # smaller counts stand before larger ones
        best[counts] = max(
            (
                rows + best[tuple(a - b for a, b in zip(counts, usage, strict=True))]
                for usage, rows in columns
                if all(a >= b for a, b in zip(counts, usage, strict=True))
            ),
            default=0,
        )
    usage = np.array([usage for usage, _ in columns], dtype=np.int64).reshape(-1, pools)
    rows = np.array([rows for _, rows in columns], dtype=np.int64)
    fits = (usage <= np.array(available)).all(axis=1)
    found = Counted(usage[fits], np.array(available)).most_rows(rows[fits])
    assert found.tolist() == np.array(list(best.values())).reshape(found.shape).tolist()
