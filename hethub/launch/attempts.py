"""A training in as many attempts as it takes: after a failure the policy decides, the crew regroups, the plan may be
made anew, and training goes on from the newest intact checkpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from hethub.checkpoints.manifest import TrainingSpec
from hethub.checkpoints.restarts import Cause, decide, told_cause
from hethub.checkpoints.store import CHECKPOINTS, Store
from hethub.errors import RunError
from hethub.interruption import stop_if_asked
from hethub.launch.compiled import Compiled, choose_plans, compile_plan
from hethub.launch.crew import WorkerFailedError
from hethub.launch.drift import Moved
from hethub.launch.history import HISTORY, HistorySettings, read_history
from hethub.launch.journal import Event, Journal, read_journal
from hethub.launch.keeper import Keeper, SaveCounts
from hethub.launch.outcome import RunOutcome
from hethub.launch.session import Attempt, Session
from hethub.program.faults import faults_left, plan_faults
from hethub.specs.job import COMPUTE, JOIN, Fault, Job

__all__ = ["Attempts", "next_attempt"]

_MORE_DEATHS_SECONDS = 0.25


def next_attempt(folder: Path) -> int:
    """The number after all that a run's journal and histories know, whichever driver gave them."""
    events, _ = read_journal(folder)
    entries, _ = read_history(folder / HISTORY)
    return 1 + max([event.attempt for event in events] + [entry.attempt for entry in entries], default=0)


@dataclass(slots=True)
class Attempts:
    """The attempts of one driver at a run. `goes_on` says whether the first may find checkpoints."""

    job: Job
    folder: Path
    compiled: Compiled
    training: TrainingSpec
    session: Session
    journal: Journal
    number: int
    goes_on: bool
    say: Callable[[str], None]
    scale: float | None = None
    counts: SaveCounts = field(default_factory=SaveCounts)
    restarts_at: list[float] = field(default_factory=list)
    faults: tuple[Fault, ...] = ()
    _reached: int = 0
    _stepped_at: float | None = None  # when a step ended that was new
    _failed_at: float | None = None
    _cause: str = ""
    _seconds: dict[str, float] = field(default_factory=dict)

    def train(self, ready: Callable[[Session], float], title: str) -> RunOutcome:
        """Train to the end, or to a stop that was asked for. `ready` brings joined workers to a time scale, once.

        Raises RunError where the policy does not go on.
        """
        self.faults = self.job.faults
        while True:
            attempt = self._attempt()
            try:
                self._lap("import_seconds", self.session.crew.prepare)
                self._lap("join_seconds", lambda: self.session.join(self.faults))
                if self.scale is None:
                    self.scale = ready(self.session)
                outcome = self.session.train(self.compiled, self.job.steps, self.scale, title, attempt)
            except WorkerFailedError as failure:
                self._recover(attempt, failure)
            except KeyboardInterrupt:
                self._note("stopped", attempt.done)
                raise
            else:
                self._note("stopped" if outcome.stopped else "ended", attempt.done)
                return outcome

    def _lap(self, name: str, work: Callable[[], None]) -> None:
        begin = time.monotonic()
        work()
        seconds = time.monotonic() - begin
        self._seconds[name] = seconds
        self.session.start.setdefault(name, seconds)

    def _note(self, event: str, step: int) -> None:
        self.session.telemetry.state(event)
        counts = {
            "restarts": sum(e.event == "failed" for e in read_journal(self.folder)[0]),
            "checkpoints": self.counts.made,
            "checkpoint_failures": self.counts.failed,
        }
        self.journal.add(
            Event.model_validate({"event": event, "attempt": self.number, "step": step, "counts": counts})
        )

    def _attempt(self) -> Attempt:
        history = self.folder / HISTORY
        history.mkdir(exist_ok=True)
        store = Store(self.folder / CHECKPOINTS)
        store.clean()
        number = self.number

        def keeper_from(step: int) -> Keeper | None:
            policy = self.job.checkpoint
            if policy is None:
                return None
            return Keeper(
                store,
                policy,
                self.compiled,
                self.training,
                self.job.optimizer,
                run=self.job.output.name,
                attempt=number,
                start=step,
                counts=self.counts,
                may_commit=self.session.lease.held,
                say=self.say,
            )

        attempt = Attempt(
            history=HistorySettings(
                folder=history,
                run=self.job.output.name,
                attempt=number,
                plan=self.compiled.digest,
                digest_every=self.job.digest_every,
            ),
            store=store,
            faults=tuple(fault for fault in self.faults if fault.action != JOIN),
            keeper_from=keeper_from,
            begins=self._begins,
            passed=lambda seconds: self._passed(attempt),
            evaluated=lambda step, loss: self.journal.add(
                Event(event="evaluated", attempt=number, step=step, loss=loss)
            ),
            moved=self._moved,
            goes_on=self.goes_on,
            reached=self._reached,
        )
        return attempt

    def _begins(self, step: int) -> None:
        self.journal.add(
            Event(
                event="began",
                attempt=self.number,
                step=step,
                plan=self.compiled.digest,
                devices=self.compiled.names(),
            )
        )

    def _moved(self, step: int, moved: Moved) -> None:
        self.journal.add(
            Event(
                event="moved",
                attempt=self.number,
                step=step,
                device=moved.name if moved.what == "device" else "",
                link=moved.name if moved.what == "link" else "",
                ratio=moved.ratio,
                reason=moved.words,
            )
        )

    def _passed(self, attempt: Attempt) -> None:
        """A step that no earlier attempt had done: what the failures before it cost is known."""
        self._stepped_at = now = time.monotonic()
        if self._failed_at is None:
            return
        total = now - self._failed_at
        self._failed_at = None
        seconds = {**self._seconds, **attempt.seconds, "total_seconds": total}
        self.journal.add(Event(event="recovered", attempt=self.number, step=attempt.done, seconds=seconds))
        self.say(f"recovered after {total:.1f} s")
        self.session.telemetry.recovered(self._cause, total)

    # -- after a failure -------------------------------------------------------------------------------------------

    def _recover(self, attempt: Attempt, failure: WorkerFailedError) -> None:
        """Make the next attempt ready. Raises RunError where the policy does not go on."""
        now = time.monotonic()
        failure, cause, dead = self._what_failed(failure)
        self._reached = max(self._reached, attempt.done)
        decision = decide(cause, self.job.on_failure, self.restarts_at, now)
        lost = tuple(sorted({failure.device, *dead})) if decision.without_the_lost else ()
        self._cause = cause.value
        self.session.telemetry.failed(cause.value, restarts=decision.restart)
        self.journal.add(
            Event(
                event="failed",
                attempt=self.number,
                step=attempt.done,
                cause=cause.value,
                device=failure.device,
                action=failure.action,
                reason=failure.reason,
                lost=lost,
                goes_on=decision.restart,
            )
        )
        if not decision.restart:
            words = "" if self.job.on_failure.restart == "none" else f" Not restarted: {decision.why}."
            raise RunError(failure.message + words) from failure
        self.say(f"attempt {self.number} failed ({cause.value}): {failure.message}")
        stop_if_asked()  # in the patience of the attempt, whose steps are lost now
        self.say(f"going on, {decision.why}")
        self.restarts_at.append(now)
        if self._failed_at is None:  # else no attempt since has come further: the time since then is lost too
            self._failed_at = now if self._stepped_at is None else self._stepped_at
        self._seconds = {}
        self._drop_faults()
        if lost:
            self._lap("plan_seconds", lambda: self._replan(lost))
        ended = () if cause in (Cause.LINK, Cause.NOT_A_NUMBER) else (failure.device,)
        self._lap("regroup_seconds", lambda: self.session.regroup(self.job, self.compiled, ended))
        self.number += 1
        self.goes_on = True

    def _what_failed(self, failure: WorkerFailedError) -> tuple[WorkerFailedError, Cause, Collection[str]]:
        """Who failed first, the cause, a node where all of its workers are gone; and the names of the dead."""
        crew = self.session.crew
        everyone = crew.cluster.devices()
        dead = {everyone[d].name for d in crew.dead()}
        # A node's workers do not die in one instant, nor are they all at the same action.
        end, look = time.monotonic() + _MORE_DEATHS_SECONDS, threading.Event()
        while dead and time.monotonic() < end:
            look.wait(_MORE_DEATHS_SECONDS / 5)
            dead |= {everyone[d].name for d in crew.dead()}
        gone = [d for d in crew.devices if everyone[d].name in dead]
        # A survivor may be the first to tell, of its lost connection to them.
        if gone and failure.cause == Cause.LINK:
            failure = crew.died(gone[0])
        used = (everyone[d].name for d in crew.devices)
        return failure, told_cause(failure.cause, failure.device, used, dead), dead

    def _replan(self, lost: Collection[str]) -> None:
        cluster = self.job.cluster
        self.job = replace(self.job, plan=None, cluster=replace(cluster, exclude=cluster.exclude | set(lost)))
        plan, _ = choose_plans(replace(self.job, compare_even_steps=0))
        self.compiled = compile_plan(plan)
        self.session.steps = None  # they are of the plan that is replaced now
        self.compiled.save(self.folder)
        self.faults = faults_left(
            self.faults, cluster, self.job.cluster, self.compiled.program, self.compiled.seconds
        )

    def _drop_faults(self) -> None:
        """Faults that have had their chance do not come again, or the run would never get past them: by where their
        devices had come to."""
        where = self.session.beacon.get
        left = []
        for fault in self.faults:
            if fault.action == COMPUTE or fault.link:  # one that lasts does not keep the run from going on
                left.append(fault)
            elif fault.action != JOIN:
                (planned,) = plan_faults([fault], self.compiled.program, self.compiled.seconds)
                if where(planned.device) < (planned.step, planned.action):
                    left.append(fault)
        self.faults = tuple(left)
