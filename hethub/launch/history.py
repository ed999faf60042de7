"""The history of a run: what every worker trained on, step by step (`history_check` judges it).

Each worker appends one line of JSON per step to `history/<device>.jsonl`, whole lines only; a line that a dying worker
left torn is no line. A step is committed when all devices of its attempt have recorded it. A later attempt that does a
step again replaces it, so a step counts once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field, ValidationError

from hethub.program.actions import Program
from hethub.specs.base import Spec
from hethub.specs.layout import Span

if TYPE_CHECKING:
    from hethub.data.batches import Batches

__all__ = [
    "HISTORY",
    "Entry",
    "HistorySettings",
    "HistoryWriter",
    "Read",
    "digest",
    "history_file",
    "mend",
    "ranges",
    "read_history",
    "whole_lines",
]

HISTORY = "history"  # folder of the run folder: what every worker trained on

T = TypeVar("T")
S = TypeVar("S", bound=Spec)
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
    norm: str = Field(
        "", description="Gradient norm before clipping, likewise; not finite: no update was made."
    )
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
        file = history_file(settings.folder, self._device)
        mend(file)
        self._stream = file.open("ab")

    def watching(self, get: Callable[[int, int], T]) -> Callable[[int, int], T]:
        """A `get(start, stop)` of a step's rows that notes which ones are asked for."""

        def noted(start: int, stop: int) -> T:
            self._seen.append((start, stop))
            return get(start, stop)

        return noted

    def digests_due(self, step: int, total_steps: int) -> bool:
        """Whether the entry of `step` holds digests: every so many steps, and the last."""
        return (step + 1) % self._settings.digest_every == 0 or step + 1 == total_steps

    def add(self, step: int, loss: float, norm: float, digests: Mapping[int, str] | None = None) -> None:
        """Record a step that is done; the rows seen since the last one belong to it."""
        seen = {row for start, stop in self._seen for row in range(start, stop)}
        self._seen.clear()
        reads = {
            role: Read(group=group, rows=ranges(rows & seen), samples=self._samples(step, rows & seen))
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
            norm=norm.hex(),
            inputs=reads.get("inputs"),
            targets=reads.get("targets"),
            stray=ranges(stray),
            digests=dict(digests or {}),
        )
        self._stream.write(entry.model_dump_json(exclude_defaults=True).encode() + b"\n")
        self._stream.flush()

    def _samples(self, step: int, rows: set[int]) -> tuple[int, ...]:
        return tuple(
            int(sample)
            for start, stop in ranges(rows)
            for sample in self._batches.sample_ids(step, start, stop)
        )

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()


def mend(file: Path) -> None:
    """Cut off a last line without an end, which a dying process left: the next one would be joined to it."""
    if file.exists():
        with file.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def ranges(rows: Iterable[int]) -> tuple[Span, ...]:
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
    entries: list[Entry] = []
    problems: list[str] = []
    for file in sorted(folder.glob("*.jsonl")):
        found, wrong = whole_lines(file, Entry, "entry of a history")
        entries += found
        problems += wrong
    return entries, problems


def whole_lines(file: Path, kind: type[S], words: str) -> tuple[list[S], list[str]]:
    """The lines of a file that was appended to, a torn last one left out: those that are of a `kind` (`words` to
    people), and a line of text for each that is none. Raises OSError."""
    found, problems = [], []
    *lines, _ = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            problems.append(f"{file.name}:{number}: no {words}: {first['msg']}")
    return found, problems
