"""The event loop compiled by numba: the functions of `kernel.py` as they stand there, in a name space of their own.

Compiling takes seconds once; numba keeps the result on disk, beside the source or in the user's cache folder, until
the source changes. Loading numba and that result takes about a third of a second, so small programs run without.
`python -m hethub.simulate.compiled` compiles ahead of time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from types import FunctionType
from typing import Any

from hethub.simulate import kernel
from hethub.simulate.kernel import Rules, State, Tables

__all__ = ["compiled_events", "load_numba"]

_CALLED = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": True}


@cache
def compiled_events() -> Callable[[Tables, State, Rules], None]:
    """`kernel.run_events`, compiled; it takes tables and state as arrays."""
    numba = load_numba()
    space: dict[str, Any] = dict(vars(kernel))
    for name, function in vars(kernel).items():
        if isinstance(function, FunctionType) and function.__module__ == kernel.__name__:
            alike = FunctionType(function.__code__, space, name)
            # Only the loop itself is called from Python, and its cached code holds the others: wrappers and caches of
            # theirs would double the time of compiling. Calls are laid open, since each would pass some fifty arrays.
            entry = name == kernel.run_events.__name__
            options = {"cache": True} if entry else _CALLED
            space[name] = numba.njit(error_model="numpy", **options)(alike)
    found: Callable[[Tables, State, Rules], None] = space["run_events"]
    return found


def load_numba() -> Any:
    """Numba, which looks for BLAS by importing scipy: a fifth of a second for linear algebra that the loop has none of.
    So it finds no scipy while it loads."""
    hidden = {} if "scipy" in sys.modules else {"scipy": None}
    sys.modules.update(hidden)  # type: ignore[arg-type]
    try:
        import numba
        import numba.np.arraymath
    finally:
        for name in hidden:
            del sys.modules[name]
    return numba


def _compile_ahead() -> None:
    """Run an empty program, so that the compiled code is there and kept."""
    from hethub.cost.graph import CostGraph
    from hethub.program.actions import Program
    from hethub.simulate.columns import columns_of, new_state
    from hethub.specs.cluster import Cluster

    nothing: dict[str, Any] = dict.fromkeys((field.name for field in fields(Program)), ())
    program = Program(**(nothing | {"prices": {}, "groups": {}}))
    graph = CostGraph(
        Cluster(name="none", device_types={}, node_groups=(), links=(), emulated_time_scale=None)
    )
    columns = columns_of(program, graph)
    compiled_events()(columns.tables, new_state(columns, Rules()), Rules())


if __name__ == "__main__":
    _compile_ahead()
