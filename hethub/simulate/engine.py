"""The simulator: discrete events over the very lists that the workers execute.

Each device runs its list in order. A receive waits for the arrival, a tensor-parallel group's action starts when its
last member is there. New weights are received in the step after the one that sent them; the first step has none to
receive. Links and sends follow `Rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from hethub.cost.compute import ComputeModel
from hethub.program.actions import Program
from hethub.program.prove import ProgramError
from hethub.simulate.columns import columns_of, new_state
from hethub.simulate.compiled import compiled_events
from hethub.simulate.deadlock import deadlock_text
from hethub.simulate.kernel import Rules, State, Tables, run_events
from hethub.simulate.records import records_of
from hethub.timeline.record import Kind, Timeline, TimelineInfo

__all__ = ["Rules", "Simulation", "seconds_by_action", "simulate"]

# Rows from which loading the compiled loop, a third of a second, pays; links that are shared take more events.
_COMPILED = 400_000
_COMPILED_SHARING = 30_000


@dataclass(frozen=True, slots=True)
class Simulation:
    """One simulated step: its seconds and, when asked for, its timeline.

    The timeline's step 0 is the one to look at; where three steps were simulated its neighbours -1 and 1
    stand beside it, since a device that is done early begins the next step.
    """

    step_seconds: float
    timeline: Timeline | None


def simulate(
    program: Program,
    compute: ComputeModel,
    *,
    record: bool = True,
    steps: int = 1,
    sub_events: bool = True,
    rules: Rules | None = None,
    loop: Literal["compiled", "interpreted"] | None = None,
) -> Simulation:
    """Predict one step of a program: the middle one of `steps` (1 or 3) that follow without a pause.

    What actions take stands in the program, as it was compiled or priced anew (`pace.py`); `compute` says what messages
    and links take. To predict under other prices, compile under them.

    One step alone leaves out what devices that are done early already do for the next, and ends when the
    last new weights have arrived, which following steps hide under their first forwards: it is the longer figure.
    `sub_events` records the collectives inside compute actions too, which are most of the
    records of a big plan and change no share of a summary. `loop` runs the events compiled or not, with equal results;
    by default as the size of the program suggests. Without `rules` sends are overlapped and links are as the cost graph
    says. Raises ProgramError on a deadlock.
    """
    types = [device.type for device in compute.graph.devices]
    columns = columns_of(
        program, compute.graph, compute.message_work, lambda d, size: compute.touch_seconds(types[d], size)
    )
    rules = (rules or Rules(sharing=compute.graph.shares_links))._replace(steps=steps)
    rows = steps * len(columns.tables.code)
    compiled = _pays(rows, rules) if loop is None else loop == "compiled"
    state = new_state(columns, rules)
    if compiled:
        compiled_events()(columns.tables, state, rules)
    else:
        state = State(*map(_as_list, state))
        run_events(Tables(*map(_as_list, columns.tables)), state, rules)
    stuck = deadlock_text(program, columns.tables, state)
    if stuck is not None:
        raise ProgramError(stuck)
    seconds = _step_seconds(state, steps)
    if not record:
        return Simulation(seconds, None)
    devices = compute.graph.devices
    info = TimelineInfo(
        origin="predicted",
        devices=tuple(device.name for device in devices),
        device_types=tuple(device.type.name for device in devices),
        emulated=compute.graph.cluster.emulated_time_scale is not None,
    )
    return Simulation(
        seconds, Timeline(info, records_of(program, columns, state, steps, sub_events=sub_events))
    )


def seconds_by_action(predicted: Timeline) -> Mapping[tuple[int, int], float]:
    """(device, action) -> predicted seconds in step 0; of a receive: from the message's sending to its arrival."""
    records = predicted.records
    records = records[(records["step"] == 0) & (records["kind"] != Kind.COLLECTIVE)]
    since = np.where(np.isnan(records["sent"]), records["start"], records["sent"])
    keys = zip(records["device"].tolist(), records["action"].tolist(), strict=True)
    return dict(zip(keys, (records["end"] - since).tolist(), strict=True))


def _pays(rows: int, rules: Rules) -> bool:
    """Whether the compiled loop is loaded, or so many rows are worth loading it."""
    loaded = compiled_events.cache_info().currsize > 0
    return loaded or rows >= (_COMPILED_SHARING if rules.sharing else _COMPILED)


def _as_list(column: Any) -> Any:
    return column.tolist()


def _step_seconds(state: State, steps: int) -> float:
    """The middle step's seconds; of a single one, until the last message has arrived."""
    ends = np.asarray(state.ends).reshape(steps, -1)
    if steps == 1:
        return float(max(ends.max(initial=0.0), np.asarray(state.arrival).max(initial=0.0)))
    middle = steps // 2
    return float(ends[middle].max() - ends[middle - 1].max())
