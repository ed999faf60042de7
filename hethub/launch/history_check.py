"""Decides from the histories of a run alone whether it was the training that it should have been.

The invariants (docs/reliability.md): no sample lost or repeated among committed steps (I1); the same plan gives the
same bits (I2); replicas hold the same bytes (I3); every failure has its cause (I5); journal and histories agree (I6);
the run came to its end (I7). That nothing is left behind (I4) is for those who look at processes and files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from hethub.launch.history import Entry, Read, ranges
from hethub.launch.journal import Event
from hethub.specs.layout import Span

__all__ = ["check_history", "check_journal", "committed_steps", "compare_histories"]

_SHOWN_PROBLEMS = 20


def check_history(entries: Sequence[Entry], steps: int | None = None) -> list[str]:
    """What is wrong with a history, a line each; [] when nothing is.

    Every committed step was recorded by all devices with one loss and one plan; its rows were read once each, in and
    out; no sample came twice within an epoch; all holders of a slice have the same bytes; a step that was done again
    has the same samples and, under the same plan, the same bits. With `steps`, that many steps from 0 on must be
    committed; without, those from the first to the last.
    """
    problems = [*_check_lines(entries), *_check_whole(entries), *_check_again(entries)]
    committed = committed_steps(entries)
    problems += _check_committed(committed, steps)
    seen: dict[tuple[int, int], int] = {}
    for step, found in sorted(committed.items()):
        problems += _check_step(step, found)
        problems += _check_epoch(step, found, seen)
    return _shown(problems)


def committed_steps(entries: Sequence[Entry]) -> dict[int, list[Entry]]:
    """Step -> its entries, of the last attempt that all devices of recorded it. An attempt that goes on from a step
    voids what earlier ones did from there on."""
    committed: dict[int, list[Entry]] = {}
    for _, by_step in sorted(_by_attempt(entries).items()):
        first = min(by_step)
        committed = {step: found for step, found in committed.items() if step < first}
        committed.update({step: found for step, found in by_step.items() if len(found) == found[0].devices})
    return committed


def compare_histories(
    entries: Sequence[Entry], expected: Sequence[Entry], *, relative: float = 1e-6
) -> list[str]:
    """Where a run differs from one that nothing happened to: other samples; another loss, by a bit under the same plan,
    by more than `relative` under another."""
    problems = []
    ours, theirs = committed_steps(entries), committed_steps(expected)
    for step in sorted(ours.keys() | theirs.keys()):
        if step not in ours or step not in theirs:
            problems.append(f"step {step} is in one of the two only")
            continue
        problems += _differences(step, "the other run", ours[step], theirs[step], relative)
    return _shown(problems)


def check_journal(entries: Sequence[Entry], events: Sequence[Event], steps: int | None = None) -> list[str]:
    """Where the driver's journal and the workers' histories are at odds, or a failure has no cause.

    With `steps` the run must have come to its end after so many.
    """
    problems = []
    began = [event for event in events if event.event == "began"]
    for before, after in pairwise(event.attempt for event in began):
        if after <= before:
            problems.append(f"attempt {after} begins after attempt {before}")
    of = {event.attempt: event for event in began}
    for attempt, by_step in sorted(_by_attempt(entries).items()):
        event = of.get(attempt)
        if event is None:
            problems.append(f"attempt {attempt} has a history and never began")
            continue
        found = [entry for of_step in by_step.values() for entry in of_step]
        if {entry.device for entry in found} - set(event.devices):
            problems.append(f"attempt {attempt}: others than its devices recorded steps")
        if {entry.plan for entry in found} != {event.plan}:
            problems.append(f"attempt {attempt}: the plan of its history is not the one that it began with")
        if min(by_step) != event.step:
            problems.append(
                f"attempt {attempt} began at step {event.step}, its history begins at {min(by_step)}"
            )
    failed = [event for event in events if event.event == "failed"]
    for event in failed:
        if not (event.cause and event.device and event.action and event.reason) or "\n" in event.reason:
            problems.append(
                f"attempt {event.attempt} failed without cause, device, action and a reason of one line"
            )
    ended = [event for event in events if event.event == "ended"]
    if ended and ended[-1].counts.get("restarts") != len(failed):
        problems.append(
            f"{ended[-1].counts.get('restarts')} restarts are counted, {len(failed)} failures recorded"
        )
    if steps is not None and (not ended or events[-1] != ended[-1] or ended[-1].step != steps):
        problems.append(f"the run did not come to its end after {steps} steps")
    return _shown(problems)


def _shown(problems: list[str]) -> list[str]:
    rest = len(problems) - _SHOWN_PROBLEMS
    return problems[:_SHOWN_PROBLEMS] + ([f"... and {rest} more"] if rest > 0 else [])


def _check_whole(entries: Sequence[Entry]) -> Iterator[str]:
    """A step that not all devices recorded was the last of its attempt."""
    for attempt, by_step in sorted(_by_attempt(entries).items()):
        whole = [step for step, found in by_step.items() if len(found) == found[0].devices]
        for step, found in sorted(by_step.items()):
            if step not in whole and any(later > step for later in whole):
                names = ", ".join(entry.device for entry in found)
                yield (
                    f"attempt {attempt}, step {step}: only {len(found)} of {found[0].devices} devices recorded it "
                    f"({names})"
                )


def _check_again(entries: Sequence[Entry]) -> Iterator[str]:
    """A step done by several attempts."""
    by_step: dict[int, dict[int, list[Entry]]] = defaultdict(dict)
    for attempt, steps in _by_attempt(entries).items():
        for step, found in steps.items():
            by_step[step][attempt] = found
    for step, attempts in sorted(by_step.items()):
        for one, other in combinations(sorted(attempts), 2):
            yield from _differences(step, f"attempt {one}", attempts[other], attempts[one], None)


def _differences(
    step: int, whose: str, ours: Sequence[Entry], theirs: Sequence[Entry], relative: float | None
) -> Iterator[str]:
    """Between two accounts of one step: other samples, another loss, other bytes. `relative` None asks nothing of the
    losses of two plans."""
    one, other = _samples(ours), _samples(theirs)
    row = next((row for row in sorted(one.keys() & other.keys()) if one[row] != other[row]), None)
    if row is not None:
        yield f"step {step}: row {row} is sample {one[row]}, of {whose} {other[row]}"
    if ours[0].plan == theirs[0].plan:
        if ours[0].loss != theirs[0].loss:
            yield f"step {step}: the loss is {ours[0].loss}, of {whose} {theirs[0].loss}, under the same plan"
        known = {number: value for entry in theirs for number, value in entry.digests.items()}
        for entry in ours:
            for number, value in entry.digests.items():
                if known.get(number, value) != value:
                    yield f"step {step}: slice {number} of the weights on {entry.device} is not that of {whose}"
    elif relative is not None:
        mine, wanted = float.fromhex(ours[0].loss), float.fromhex(theirs[0].loss)
        if not abs(mine - wanted) <= relative * abs(wanted):
            yield f"step {step}: the loss is {mine!r}, of {whose} {wanted!r}: more than {relative:g} apart"


def _samples(entries: Sequence[Entry]) -> dict[int, int]:
    """Row of the batch -> sample, of one account of a step."""
    found: dict[int, int] = {}
    for read in (entry.inputs for entry in entries):
        if read is not None:
            found.update(zip((r for span in read.rows for r in range(*span)), read.samples, strict=False))
    return found


def _by_attempt(entries: Sequence[Entry]) -> dict[int, dict[int, list[Entry]]]:
    """Attempt -> step -> its entries, a device's first only."""
    found: dict[int, dict[int, dict[str, Entry]]] = defaultdict(lambda: defaultdict(dict))
    for entry in entries:
        found[entry.attempt][entry.step].setdefault(entry.device, entry)
    return {
        attempt: {step: [*of_device.values()] for step, of_device in by_step.items()}
        for attempt, by_step in found.items()
    }


def _check_lines(entries: Sequence[Entry]) -> Iterator[str]:
    """Within an attempt every device goes on step by step."""
    runs = sorted({entry.run for entry in entries})
    if len(runs) > 1:
        yield f"entries of several runs: {', '.join(runs)}"
    steps: dict[tuple[int, str], list[int]] = defaultdict(list)
    for entry in entries:
        steps[entry.attempt, entry.device].append(entry.step)
    for (attempt, device), found in sorted(steps.items()):
        for before, after in pairwise(found):
            if after != before + 1:
                yield f"attempt {attempt}, {device}: step {after} follows step {before}"


def _check_committed(committed: Mapping[int, object], steps: int | None) -> Iterator[str]:
    expected = (
        range(steps)
        if steps is not None
        else range(min(committed, default=0), max(committed, default=-1) + 1)
    )
    missing = ranges(set(expected) - set(committed))
    beyond = ranges(set(committed) - set(expected))
    yield from (f"{_steps(span)} committed by nobody" for span in missing)
    yield from (f"{_steps(span)} past the run's end" for span in beyond)


def _steps(span: Span) -> str:
    return _counted("step", span)


def _counted(what: str, span: Span) -> str:
    first, last = span[0], span[1] - 1
    return f"{what} {first} is" if first == last else f"{what}s {first} to {last} are"


def _check_step(step: int, entries: Sequence[Entry]) -> Iterator[str]:
    """One committed step, by all its devices."""
    first = entries[0]
    for what in ("loss", "plan", "batch", "epoch"):
        for entry in entries:
            if getattr(entry, what) != getattr(first, what):
                yield (
                    f"step {step}: {what} is {getattr(first, what)} on {first.device}, "
                    f"{getattr(entry, what)} on {entry.device}"
                )
    for entry in entries:
        if entry.stray:
            yield f"step {step}: {entry.device} read rows that are not its own: {_show(entry.stray)}"
    inputs = yield from _check_reads(step, "inputs", {e.device: e.inputs for e in entries}, first.batch)
    targets = yield from _check_reads(step, "targets", {e.device: e.targets for e in entries}, first.batch)
    for row in sorted(inputs.keys() & targets.keys()):
        if inputs[row] != targets[row]:
            yield f"step {step}: row {row} is sample {inputs[row]} as input, {targets[row]} as target"
    yield from _check_digests(step, entries)


def _check_reads(
    step: int, role: str, reads: Mapping[str, Read | None], batch: int
) -> Generator[str, None, dict[int, int]]:
    """Groups read disjoint rows that make up the batch, and all members of a group the same; returns row -> sample."""
    groups: dict[tuple[str, ...], Read] = {}
    for device, read in reads.items():
        if read is None:
            continue
        known = groups.setdefault(read.group, read)
        if known != read:
            yield (
                f"step {step}, {role}: {device} read {_show(read.rows)}, its group's first {_show(known.rows)}"
                if known.rows != read.rows
                else f"step {step}, {role}: {device} read other samples than its group's first"
            )
    rows: dict[int, int] = {}
    for group, read in groups.items():
        own = [row for span in read.rows for row in range(*span)]
        if len(own) != len(read.samples):
            yield f"step {step}, {role}: {group[0]} read {len(own)} rows and {len(read.samples)} samples"
            continue
        twice = rows.keys() & set(own)
        if twice:
            yield f"step {step}, {role}: {group[0]} read {_show(ranges(twice))} again"
        rows.update(zip(own, read.samples, strict=True))
    missing = ranges(set(range(batch)) - rows.keys())
    if missing:
        yield f"step {step}, {role}: nobody read {_show(missing)}"
    return rows


def _show(spans: Sequence[Span]) -> str:
    return ", ".join(_counted("row", span).rsplit(" ", 1)[0] for span in spans) or "nothing"


def _check_epoch(step: int, entries: Sequence[Entry], seen: dict[tuple[int, int], int]) -> Iterator[str]:
    """No sample twice in an epoch; `seen` maps (epoch, sample) to the step that had it."""
    batch, length = entries[0].batch, entries[0].epoch
    rows = _samples(entries)
    for row, sample in sorted(rows.items()):
        key = ((step * batch + row) // length, sample)
        if key in seen:
            yield f"step {step}: sample {sample} was trained on before, in step {seen[key]} of the same epoch"
        seen[key] = step


def _check_digests(step: int, entries: Sequence[Entry]) -> Iterator[str]:
    known: dict[int, tuple[str, str]] = {}
    for entry in entries:
        for number, value in entry.digests.items():
            device, expected = known.setdefault(number, (entry.device, value))
            if value != expected:
                yield f"step {step}: slice {number} of the weights differs between {device} and {entry.device}"
