"""A plan's program with its simulation: of every rank, or of a big plan of every tensor-parallel group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from hethub.cost.compute import ComputeModel
from hethub.cost.memory import device_memory
from hethub.program.actions import Program
from hethub.program.compile import compile_program
from hethub.program.fold import Fold, fold
from hethub.program.memory import program_memory
from hethub.program.ownership import Ownership, own
from hethub.program.updaters import own_by_strength
from hethub.simulate.engine import Simulation, simulate
from hethub.specs.layout import Layout, lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Timeline
from hethub.timeline.summary import DeviceSummary, summarize

__all__ = ["DETAILED_ACTIONS", "Modelled", "model", "steady_step_seconds", "steady_timeline"]

DETAILED_ACTIONS = 100_000  # about; up to here every rank is simulated, and every collective can be recorded
_STEADY_ACTIONS = 500_000  # up to here three steps are simulated where one between others is asked for
_EACH = 6  # actions of a rank for each micro-batch, about: forward, backward and their messages


@dataclass(frozen=True, kw_only=True)
class Modelled:
    """`layout`, `compute` and `ownership` are the plan's. `program` is the one that was simulated: where `fold` is
    given, that of its layout, a device of which stands for its whole group."""

    layout: Layout
    compute: ComputeModel
    ownership: Ownership
    program: Program
    simulation: Simulation
    fold: Fold | None = None

    @cached_property
    def peak_bytes(self) -> Mapping[int, int]:
        """Peak memory of every used device: walked through its program, or where that is folded the closed form's."""
        if self.fold is None:
            peaks = program_memory(self.program, self.compute)
            return {device: peak.total for device, peak in peaks.items()}
        uses = device_memory(self.compute, self.layout, *self.ownership.updates)
        return {device: use.total for device, use in uses.items()}

    @cached_property
    def summaries(self) -> list[DeviceSummary]:
        """Of all devices of the cluster, by device; ranks of a folded group are alike."""
        if self.simulation.timeline is None:
            raise AssertionError("the simulation kept no timeline")
        found = summarize(self.simulation.timeline, 0, 0)
        for first, group in ({} if self.fold is None else self.fold.members).items():
            for device in group:
                found[device] = replace(found[first], device=found[device].device)
        return found

    def recorded(self) -> Modelled:
        """With a timeline; where there is none, that of the steady step."""
        return self if self.simulation.timeline is not None else self.steady(record=True)

    def steady(self, *, record: bool = False) -> Modelled:
        """With the step between two others, as runs measure it: it hides new weights under its first forwards. Of a
        very big program the one step that is simulated."""
        simulation = _simulate(self.program, self.compute, self.fold, record=record, steady=True)
        return replace(self, simulation=simulation)


def model(
    layout: Layout,
    compute: ComputeModel,
    ownership: Ownership | None = None,
    *,
    record: bool = True,
    steady: bool = False,
    detailed_actions: int = DETAILED_ACTIONS,
) -> Modelled:
    """Compile and simulate one step, or the `steady` one; `record` keeps the timeline. Of more than `detailed_actions`
    groups are simulated, not ranks."""
    if ownership is None:
        ownership = own_by_strength(layout, compute)
    folded = fold(layout, compute) if _actions(layout) > detailed_actions else None
    if folded is None:
        program = compile_program(layout, compute, ownership=ownership)
    else:
        # Groups update as much as their ranks together.
        owned = ownership.owned_elements
        shares = {d: float(sum(owned.get(rank, 0) for rank in group)) for d, group in folded.members.items()}
        table = own(folded.layout, shares)
        program = compile_program(folded.layout, folded.compute, ownership=table)
    return Modelled(
        layout=layout,
        compute=compute,
        ownership=ownership,
        program=program,
        simulation=_simulate(program, compute, folded, record=record, steady=steady),
        fold=folded,
    )


def steady_step_seconds(plan: Plan, compute: ComputeModel) -> float:
    """A step between two others, every rank simulated."""
    return simulate(compile_program(lay_out(plan), compute), compute, record=False, steps=3).step_seconds


def steady_timeline(plan: Plan, compute: ComputeModel) -> Timeline:
    """The same as a timeline, without what stands inside actions."""
    program = compile_program(lay_out(plan), compute)
    found = simulate(program, compute, steps=3, sub_events=False).timeline
    assert found is not None  # recorded
    return found


def _simulate(
    program: Program, compute: ComputeModel, folded: Fold | None, *, record: bool, steady: bool
) -> Simulation:
    actions = sum(len(actions) for actions in program.devices)
    steps = 3 if steady and actions <= _STEADY_ACTIONS else 1
    if folded is not None:
        return simulate(program, folded.compute, record=record, steps=steps, sub_events=False)
    return simulate(program, compute, record=record, steps=steps, sub_events=actions <= DETAILED_ACTIONS)


def _actions(layout: Layout) -> int:
    """Of the plan's program, about."""
    ranks = sum(p.micro_batches * len(list(s.devices())) for p in layout.pipelines for s in p.stages)
    return _EACH * ranks
