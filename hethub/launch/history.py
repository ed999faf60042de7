"""The history of a run: what every worker trained on, step by step, and a checker that reads nothing else.

Each worker appends one line of JSON per step to `history/<device>.jsonl`, whole lines only; a line that a dying worker
left torn is no line. A step is committed when all devices of its attempt have recorded it. A later attempt that does a
step again replaces it, so a step counts once.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, ValidationError

from hethub.program.actions import Program
from hethub.specs.base import Spec
from hethub.specs.layout import Span

if TYPE_CHECKING:
    from hethub.data.batches import Batches

__all__ = [
    "Entry",
    "HistorySettings",
    "HistoryWriter",
    "Read",
    "check_history",
    "digest",
    "history_file",
    "read_history",
]

T = TypeVar("T")
_SHOWN_PROBLEMS = 20
_DIGEST_HEX = 16  # 64 bits: enough to tell weights apart that no one forges


class Read(Spec):
    """What one tensor-parallel group read of a step's batch: rows [a, b) of it, and the samples they are."""

    group: tuple[str, ...] = Field(description="Devices that read these rows together.")
    rows: tuple[tuple[int, int], ...] = Field(description="Half-open ranges of rows of the global batch.")
    samples: tuple[int, ...] = Field(description="Training window of every row, in the order of `rows`.")


class Entry(Spec):
    """One line: one device's account of one step."""

    run: str = Field(description="Name of the run.")
    attempt: int = Field(ge=1, description="1, and one more after every restart.")
    step: int = Field(ge=0, description="The step, counted from 0.")
    device: str = Field(description="group/node/device.")
    devices: int = Field(ge=1, description="How many devices record this step.")
    plan: str = Field(description="Digest of the plan.")
    batch: int = Field(ge=1, description="Rows of the global batch.")
    epoch: int = Field(ge=1, description="Samples that an epoch visits once each.")
    loss: str = Field(description="Loss as a hexadecimal float: all its bits.")
    inputs: Read | None = Field(None, description="Rows whose tokens this device's first stage read.")
    targets: Read | None = Field(None, description="Rows whose targets this device's last stage read.")
    stray: tuple[tuple[int, int], ...] = Field((), description="Rows that it read and were not its own.")
    digests: dict[int, str] = Field(
        default={}, description="Slice of the ownership table -> digest of its bytes."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HistorySettings:
    """Where and for which attempt of which run to record, and how often to digest the weights."""

    folder: Path
    run: str
    attempt: int
    plan: str
    digest_every: int


def history_file(folder: Path, device: str) -> Path:
    """A device's file in the history folder."""
    return folder / f"{device.replace('/', '-')}.jsonl"


def digest(data: bytes | memoryview) -> str:
    """Hexadecimal digest of a slice's bytes (SHA-256, cut to 64 bits)."""
    return hashlib.sha256(data).hexdigest()[:_DIGEST_HEX]


class HistoryWriter:
    """Appends one device's entries. Lines are flushed, so that they outlive the process, and not synced to disk."""

    def __init__(
        self, settings: HistorySettings, program: Program, device: int, names: Sequence[str], batches: Batches
    ) -> None:
        """`names` are those of `Cluster.devices()`, which `device` and the program index."""
        self._settings = settings
        self._batches = batches
        self._device = names[device]
        self._used = len(program.layout.used)
        self._own: dict[str, tuple[tuple[str, ...], set[int]]] = {}
        for pipeline in program.layout.pipelines:
            for stage in pipeline.stages:
                for replica in stage.replicas:
                    if all(rank.device != device for rank in replica.ranks):
                        continue
                    group = tuple(names[d] for d in program.groups[device, stage.index])
                    rows = {
                        pipeline.first_row + micro_batch * pipeline.micro_batch_rows + row
                        for micro_batch in range(pipeline.micro_batches)
                        for row in range(*replica.rows)
                    }
                    if stage.layers[0] == 0:
                        self._own["inputs"] = (group, rows)
                    if stage.layers[1] == program.layout.model.layers + 2:
                        self._own["targets"] = (group, rows)
        self.held = tuple(
            number for number, entry in enumerate(program.ownership.slices) if device in entry.holders
        )
        self._seen: list[Span] = []
        self._stream = history_file(settings.folder, self._device).open("ab")

    def watching(self, get: Callable[[int, int], T]) -> Callable[[int, int], T]:
        """A `get(start, stop)` of a step's rows that notes which ones are asked for."""

        def noted(start: int, stop: int) -> T:
            self._seen.append((start, stop))
            return get(start, stop)

        return noted

    def digests_due(self, step: int, total_steps: int) -> bool:
        """Whether the entry of `step` holds digests: every so many steps, and the last."""
        return (step + 1) % self._settings.digest_every == 0 or step + 1 == total_steps

    def add(self, step: int, loss: float, digests: Mapping[int, str] | None = None) -> None:
        """Record a step that is done; the rows seen since the last one belong to it."""
        seen = {row for start, stop in self._seen for row in range(start, stop)}
        self._seen.clear()
        reads = {
            role: Read(group=group, rows=_ranges(rows & seen), samples=self._samples(step, rows & seen))
            for role, (group, rows) in self._own.items()
        }
        stray = seen.difference(*(rows for _, rows in self._own.values()))
        entry = Entry(
            run=self._settings.run,
            attempt=self._settings.attempt,
            step=step,
            device=self._device,
            devices=self._used,
            plan=self._settings.plan,
            batch=self._batches.global_batch,
            epoch=self._batches.train_windows,
            loss=loss.hex(),
            inputs=reads.get("inputs"),
            targets=reads.get("targets"),
            stray=_ranges(stray),
            digests=dict(digests or {}),
        )
        self._stream.write(entry.model_dump_json(exclude_defaults=True).encode() + b"\n")
        self._stream.flush()

    def _samples(self, step: int, rows: set[int]) -> tuple[int, ...]:
        return tuple(
            int(sample)
            for start, stop in _ranges(rows)
            for sample in self._batches.sample_ids(step, start, stop)
        )

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()


def _ranges(rows: Iterable[int]) -> tuple[Span, ...]:
    """Half-open ranges of a set of rows, ascending."""
    found: list[Span] = []
    for row in sorted(rows):
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found)


def read_history(folder: Path) -> tuple[list[Entry], list[str]]:
    """All entries of a run's history folder, and a line for each whole line that is none.

    A last line without its end was torn by the worker's death and is left out.
    """
    entries, problems = [], []
    for file in sorted(folder.glob("*.jsonl")):
        *lines, _ = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                entries.append(Entry.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                problems.append(f"{file.name}:{number}: no entry of a history: {first['msg']}")
    return entries, problems


def check_history(entries: Sequence[Entry], steps: int | None = None) -> list[str]:
    """What is wrong with a history, a line each; [] when nothing is.

    Every committed step was recorded by all devices with one loss and one plan; its rows were read once each, in and
    out; no sample came twice within an epoch; all holders of a slice have the same bytes. With `steps`, that many
    steps from 0 on must be committed; without, those from the first to the last.
    """
    problems = [*_check_lines(entries)]
    committed: dict[int, list[Entry]] = {}
    for attempt, by_step in sorted(_by_attempt(entries).items()):
        whole = [step for step, found in by_step.items() if len(found) == found[0].devices]
        for step, found in sorted(by_step.items()):
            if step in whole:
                committed[step] = found
            elif any(later > step for later in whole):
                names = ", ".join(entry.device for entry in found)
                problems.append(
                    f"attempt {attempt}, step {step}: only {len(found)} of {found[0].devices} devices recorded it "
                    f"({names})"
                )
    problems += _check_committed(committed, steps)
    seen: dict[tuple[int, int], int] = {}
    for step, found in sorted(committed.items()):
        problems += _check_step(step, found)
        problems += _check_epoch(step, found, seen)
    rest = len(problems) - _SHOWN_PROBLEMS
    return problems[:_SHOWN_PROBLEMS] + ([f"... and {rest} more"] if rest > 0 else [])


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
    missing = _ranges(set(expected) - set(committed))
    beyond = _ranges(set(committed) - set(expected))
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
            yield f"step {step}, {role}: {group[0]} read {_show(_ranges(twice))} again"
        rows.update(zip(own, read.samples, strict=True))
    missing = _ranges(set(range(batch)) - rows.keys())
    if missing:
        yield f"step {step}, {role}: nobody read {_show(missing)}"
    return rows


def _show(spans: Sequence[Span]) -> str:
    return ", ".join(_counted("row", span).rsplit(" ", 1)[0] for span in spans) or "nothing"


def _check_epoch(step: int, entries: Sequence[Entry], seen: dict[tuple[int, int], int]) -> Iterator[str]:
    """No sample twice in an epoch; `seen` maps (epoch, sample) to the step that had it."""
    batch, length = entries[0].batch, entries[0].epoch
    rows: dict[int, int] = {}
    for read in (entry.inputs for entry in entries):
        if read is not None:
            rows.update(zip((r for span in read.rows for r in range(*span)), read.samples, strict=False))
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
