"""The simulator decides between the best few candidates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from hethub.cost.compute import ComputeModel
from hethub.cost.memory import device_memory, usable_bytes
from hethub.planners.candidate import Candidate
from hethub.planners.interface import Problem
from hethub.planners.placement import place
from hethub.planners.pools import Pools
from hethub.program.ownership import Ownership
from hethub.program.updaters import own_by_speed, own_by_strength
from hethub.simulate.modelled import DETAILED_ACTIONS, Modelled, model
from hethub.specs.layout import Layout, lay_out
from hethub.specs.plan import Plan

__all__ = [
    "FIRST_SCHEDULE",
    "Finalist",
    "actions_of",
    "describe",
    "fits",
    "is_simulated_whole",
    "run_off",
    "simulate_plan",
    "simulate_with_room",
    "why_slower",
]


_WHOLE_ACTIONS = 120_000  # about; candidates with more are simulated in part
FIRST_SCHEDULE = "1f1b-split"  # under which candidates are simulated first
_SAMPLED = 2  # of alike pipelines, in such a part
_ROUNDS = 2  # micro-batches for each stage, in such a part


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """A candidate that was placed and simulated. `step_seconds` is the simulated step: of the whole plan where there is
    `modelled`, else of a part of it, in which at most two of alike pipelines work and exchange their gradients."""

    candidate: Candidate
    plan: Plan
    step_seconds: float
    modelled: Modelled | None


def fits(
    compute: ComputeModel,
    layout: Layout,
    ownership: Ownership,
    reserve_bytes: Mapping[str, int] | None = None,
) -> bool:
    """Whether every device's peak memory, its true share of the updates counted, is within its size, less what the user
    keeps free on its type."""
    return not _short(compute, layout, ownership, reserve_bytes)


def _short(
    compute: ComputeModel, layout: Layout, ownership: Ownership, reserve_bytes: Mapping[str, int] | None
) -> set[int]:
    """The devices that lack memory."""
    reserve, graph = reserve_bytes or {}, compute.graph
    types = [device.type for device in graph.devices]
    use = device_memory(compute, layout, *ownership.updates)
    return {
        d
        for d, memory in use.items()
        if memory.total > usable_bytes(types[d]) - reserve.get(graph.as_known(types[d]).name, 0)
    }


def _less_in_flight(plan: Plan, layout: Layout, short: set[int]) -> Plan | None:
    """With one micro-batch less in flight on the stages of these devices, which lack memory: what split backwards take
    more is less than that. None where one has no more than one in flight."""
    pipelines, at = [], 0
    for pipeline in plan.pipelines:
        alike = layout.pipelines[at : at + pipeline.repeat]
        at += pipeline.repeat
        stages = []
        for number, stage in enumerate(pipeline.stages):
            lacks = any(not short.isdisjoint(p.stages[number].devices()) for p in alike)
            if lacks and stage.in_flight == 1:
                return None
            stages.append(stage.model_copy(update={"in_flight": stage.in_flight - lacks}))
        pipelines.append(pipeline.model_copy(update={"stages": stages}))
    return plan.model_copy(update={"pipelines": pipelines})


def simulate_plan(
    plan: Plan,
    compute: ComputeModel,
    *,
    reserve_bytes: Mapping[str, int] | None = None,
    steady: bool = False,
    record: bool = False,
) -> Modelled | None:
    """Program and simulation of a plan, of its `steady` step if asked, or None when it does not fit."""
    layout = lay_out(plan)
    ownership = own_by_strength(layout, compute)
    if not fits(compute, layout, ownership, reserve_bytes):
        return None
    return model(layout, compute, ownership, record=record, steady=steady)


def simulate_with_room(
    plan: Plan,
    compute: ComputeModel,
    *,
    reserve_bytes: Mapping[str, int] | None = None,
    steady: bool = False,
    record: bool = False,
) -> tuple[Plan, Modelled] | None:
    """The plan with its program and simulation, with less in flight where it lacks memory; None when that does not fit
    either."""
    layout = lay_out(plan)
    ownership = own_by_strength(layout, compute)
    short = _short(compute, layout, ownership, reserve_bytes)
    if not short:
        return plan, model(layout, compute, ownership, record=record, steady=steady)
    less = _less_in_flight(plan, layout, short)
    if less is None:
        return None
    modelled = simulate_plan(less, compute, reserve_bytes=reserve_bytes, steady=steady, record=record)
    return None if modelled is None else (less, modelled)


def run_off(candidates: Iterable[Candidate], problem: Problem, pools: Pools) -> list[Finalist]:
    """Compile and simulate; the quickest first. Those that do not fit after all are left out, but of those that are
    simulated in part: whether the whole fits is seen when it is completed. Of these no more are looked at than may be
    the quickest: none is quicker than its closed form."""
    chosen = list(candidates)
    # compared are like with like
    whole = all(is_simulated_whole(candidate) for candidate in chosen)
    if not whole:
        chosen = [_with_room(candidate) for candidate in chosen]
    reserve = problem.constraints.memory_reserve_bytes
    finalists: list[Finalist] = []
    for candidate in chosen:
        best = min((f.step_seconds for f in finalists), default=math.inf)
        if not whole and candidate.split_backward_seconds >= best:
            continue
        plan = place(candidate, pools, problem.cluster, problem.workload)
        if plan is None:
            continue
        modelled = None
        if whole and candidate.schedule == FIRST_SCHEDULE:
            roomy = simulate_with_room(plan, problem.compute, reserve_bytes=reserve)
            plan, modelled = roomy or (plan, None)
        elif whole:
            modelled = simulate_plan(plan, problem.compute, reserve_bytes=reserve)
        if whole:
            seconds = None if modelled is None else modelled.simulation.step_seconds
        else:
            seconds = _part_seconds(candidate, problem, pools)
        if seconds is not None:
            finalists.append(
                Finalist(candidate=candidate, plan=plan, step_seconds=seconds, modelled=modelled)
            )
    return sorted(finalists, key=lambda finalist: finalist.step_seconds)


def _with_room(candidate: Candidate) -> Candidate:
    """Under split 1F1B, with one micro-batch less in flight where no more fit: what a split backward takes more is less
    than that, but where stages recompute, which leaves the candidate as it is."""
    if any(stage.full for entry in candidate.entries for stage in entry.chain.stages):
        return candidate
    entries = []
    for entry in candidate.entries:
        stages = tuple(
            stage._replace(in_flight=max(1, stage.in_flight - stage.at_limit)) for stage in entry.chain.stages
        )
        entries.append(entry._replace(chain=replace(entry.chain, stages=stages)))
    return replace(candidate, entries=tuple(entries), schedule=FIRST_SCHEDULE)


def _part_seconds(candidate: Candidate, problem: Problem, pools: Pools) -> float | None:
    """Simulated seconds of a part of a plan and the periods of the micro-batches that it lacks: what stages that wait
    for each other cost. All pipelines lack as much time. At least the closed form's with split backwards, since fewer
    pipelines exchange less; None where the part cannot be placed."""
    further = min(
        (e.micro_batches - _ROUNDS * len(e.chain.stages)) * e.chain.period_seconds for e in candidate.entries
    )
    left_out = [max(0, int(further / entry.chain.period_seconds)) for entry in candidate.entries]
    entries = tuple(
        entry._replace(repeat=min(entry.repeat, _SAMPLED), micro_batches=entry.micro_batches - left)
        for entry, left in zip(candidate.entries, left_out, strict=True)
    )
    rows = sum(e.repeat * e.micro_batches * e.chain.rows for e in entries)
    workload = replace(problem.workload, global_batch=rows)
    plan = place(replace(candidate, entries=entries), pools, problem.cluster, workload)
    if plan is None:
        return None
    layout = lay_out(plan)
    # fewer pipelines share the updates than in the whole, so that what fits here says nothing
    ownership = own_by_speed(layout, problem.compute)
    done = model(layout, problem.compute, ownership, record=False, detailed_actions=0)
    seconds = done.simulation.step_seconds
    lacking = max(left * e.chain.period_seconds for left, e in zip(left_out, entries, strict=True))
    return max(candidate.split_backward_seconds, seconds + lacking)


def is_simulated_whole(candidate: Candidate) -> bool:
    """Whether all of it is simulated at once; else a part of it."""
    return actions_of(candidate) <= _WHOLE_ACTIONS


def actions_of(candidate: Candidate) -> int:
    """Actions that are simulated, about: forward, backward and four messages of every micro-batch and rank, or of a big
    plan every group; and in the exchange a few of every pair of pipelines."""
    ranks = groups = pairs = 0
    pipelines = sum(entry.repeat for entry in candidate.entries)
    for entry in candidate.entries:
        for stage in entry.chain.stages:
            for seat, _ in stage.seats:
                each = 6 * entry.repeat * entry.micro_batches * seat.replicas
                groups, ranks = groups + each, ranks + each * seat.degree
                pairs += 4 * entry.repeat * seat.replicas * pipelines
    return (ranks if ranks <= DETAILED_ACTIONS else groups) + pairs


def describe(candidate: Candidate, pools: Pools) -> str:
    """A candidate in a few words, such as `2 x (fast 1 | slow 2), 8 x 1 rows`."""
    parts = []
    for entry in candidate.entries:
        stages = []
        for stage in entry.chain.stages:
            seats = []
            for seat, rows in stage.seats:
                group = f" TP{seat.degree}" if seat.degree > 1 else ""
                many = f"{seat.replicas}x" if seat.replicas > 1 else ""
                share = f" {rows} rows" if len(stage.seats) > 1 or seat.replicas > 1 else ""
                seats.append(f"{many}{pools[seat.pool].type.name}{group}{share}")
            full = " recomputed" if stage.full else ""
            stages.append(f"{' + '.join(seats)} {stage.decoders}{full}")
        shown = _fold(stages)
        parts.append(
            f"{entry.repeat} x ({' | '.join(shown)}), {entry.micro_batches} x {entry.chain.rows} rows"
        )
    schedule = [] if candidate.schedule == "1f1b" else [f"schedule {candidate.schedule}"]
    return "; ".join([*parts, *schedule])


def _fold(stages: list[str]) -> list[str]:
    """Equal neighbours become one, with their number."""
    folded: list[tuple[str, int]] = []
    for stage in stages:
        if folded and folded[-1][0] == stage:
            folded[-1] = (stage, folded[-1][1] + 1)
        else:
            folded.append((stage, 1))
    return [text if count == 1 else f"{count} stages of {text}" for text, count in folded]


def why_slower(loser: Candidate, winner: Candidate, seconds: float) -> str:
    """The part of the closed form in which the loser loses most, if that explains `seconds` of difference."""
    parts = (
        ("its slowest stage", _steady),
        ("filling and draining its pipelines", _fill),
        ("reducing gradients and updating", lambda candidate: candidate.tail_seconds),
    )
    more, words = max((part(loser) - part(winner), words) for words, part in parts)
    if more <= 0 or more < 0.5 * seconds:
        return "its stages wait longer for each other's messages"
    return f"{words} takes {more:.3g} s longer over the step"


def _steady(candidate: Candidate) -> float:
    return max(e.chain.period_seconds * (e.micro_batches - 1) for e in candidate.entries)


def _fill(candidate: Candidate) -> float:
    return max(e.chain.fill_seconds for e in candidate.entries)
