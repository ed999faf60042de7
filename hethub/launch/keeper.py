"""The driver's part of checkpoints: it hears what each device has written, and makes a checkpoint of it or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hethub import __version__
from hethub.checkpoints.manifest import Manifest, StateFileSpec, StoredParameter, TrainingSpec
from hethub.checkpoints.store import Store
from hethub.launch.compiled import Compiled
from hethub.specs.job import CheckpointPolicy, OptimizerSettings

if TYPE_CHECKING:  # torch is loaded when workers are
    from hethub.launch.saving import Saved

__all__ = ["Keeper", "SaveCounts"]


@dataclass(slots=True)
class SaveCounts:
    """Of a driver's life: checkpoints made, and given up. `stall_seconds` are, of each, the longest any device stood
    still; `seconds` how long it took until all was on disk, `saved_over_state` its bytes over those it must have."""

    made: int = 0
    failed: int = 0
    stall_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved_over_state: list[float] = field(default_factory=list)


class Keeper:
    """Collects reports of one attempt. A step that any device could not save is given up for all, with a warning:
    training goes on, and the next checkpoint tries again."""

    def __init__(
        self,
        store: Store,
        policy: CheckpointPolicy,
        compiled: Compiled,
        training: TrainingSpec,
        settings: OptimizerSettings,
        *,
        run: str,
        attempt: int,
        start: int,
        counts: SaveCounts,
        may_commit: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """`start` is the attempt's first step; `may_commit` tells whether this driver still holds the run."""
        self._store, self._policy, self._compiled = store, policy, compiled
        self._training, self._settings = training, settings
        self._run, self._attempt = run, attempt
        self.counts, self._may_commit, self._say = counts, may_commit, say
        self.made_step = 0  # of the last checkpoint made
        self._reports: dict[int, dict[int, Saved]] = defaultdict(dict)
        self._decided = start
        self.last_seconds: float | None = None  # that the last checkpoint took

    def expects(self, steps_done: int) -> bool:
        """Whether devices may have something to report after so many steps."""
        return steps_done // self._policy.every > self._decided // self._policy.every

    def take(self, reports: Mapping[int, Sequence[Saved]]) -> None:
        """Take reports by device; those that are known may come again."""
        for device, found in reports.items():
            for report in found:
                if report.step > self._decided:
                    self._reports[report.step][device] = report
        used = set(self._compiled.program.layout.used)
        for step in sorted(self._reports):
            if self._reports[step].keys() >= used:
                self._decide(step, self._reports.pop(step))
        for step in [step for step in self._reports if step <= self._decided]:
            del self._reports[step]

    def _decide(self, step: int, reports: Mapping[int, Saved]) -> None:
        self._decided = step
        devices = self._compiled.plan.cluster.devices()
        problems = [
            f"{devices[d].name}: {report.problem}" for d, report in sorted(reports.items()) if report.problem
        ]
        manifest = None
        if not problems:
            if not self._may_commit():
                problems.append("another driver has taken the run over")
            else:
                manifest = self._manifest(step, reports)
                try:
                    self._store.commit(manifest)
                except OSError as error:
                    problems.append(f"{error.filename or self._store.folder}: {error.strerror}")
        if problems or manifest is None:
            self.counts.failed += 1
            self._store.drop_partial(step, self._attempt)
            self._say(f"warning: no checkpoint after step {step}, training goes on: {problems[0]}")
            return
        self.made_step = step
        self.counts.made += 1
        self.counts.stall_seconds.append(max(report.stall_seconds for report in reports.values()))
        self.last_seconds = max(report.seconds for report in reports.values())
        self.counts.seconds.append(self.last_seconds)
        self.counts.saved_over_state.append(manifest.saved_bytes / manifest.state_bytes)
        try:
            self._store.prune(self._policy.keep)
        except OSError as error:
            self._say(f"warning: an old checkpoint stays: {error.filename}: {error.strerror}")

    def _manifest(self, step: int, reports: Mapping[int, Saved]) -> Manifest:
        from hethub.launch.optimizer import learning_rate

        table = self._compiled.program.ownership
        devices = self._compiled.plan.cluster.devices()
        files = tuple(
            StateFileSpec(
                device=devices[d].name,
                bytes=report.bytes,
                block_bytes=report.block_bytes,
                digest=report.digest,
                slices=tuple(
                    (table.slices[n].parameter, table.slices[n].start, table.slices[n].stop)
                    for n in table.by_updater.get(d, ())
                ),
            )
            for d, report in sorted(reports.items())
        )
        return Manifest(
            hethub=__version__,
            run=self._run,
            attempt=self._attempt,
            step=step,
            updates=next(iter(reports.values())).updates,
            learning_rate=learning_rate(self._settings, step - 1, self._training.steps),
            dtype="fp64" if self._training.precision == "fp64" else "fp32",
            plan=self._compiled.digest,
            training=self._training,
            parameters=tuple(
                StoredParameter(name=p.name, shape=p.shape, axis=p.axis) for p in table.parameters
            ),
            files=files,
        )
