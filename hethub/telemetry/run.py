"""The run's own metrics, which its driver keeps and serves: steps, losses, predictions, faults, checkpoints."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import Metric as Family

from hethub import __version__
from hethub.telemetry.families import Histogram, Series
from hethub.telemetry.metrics import METRICS, STEP_BUCKETS_SECONDS, Scope

__all__ = ["PlanFacts", "RunMetrics", "StageFacts", "StepTimes"]

_WINDOW_STEPS = 20  # over which shares of bounds and MFU are taken


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFacts:
    """The devices of one type in a stage. `predicted` are shares of a step by activity."""

    pipeline: int
    stage: int
    device_type: str
    layers: str
    recompute: str
    devices: int
    predicted: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFacts:
    """What is known of a plan before it runs. Times, rates and bounds are modelled; None is unknown."""

    digest: str
    model: str
    precision: str
    objective: str
    cluster: str
    emulated: bool
    devices: int
    rows_per_step: int
    tokens_per_step: int
    model_flops_per_token: float
    peak_flops_per_second: float | None
    step_seconds: float
    bounds: Mapping[str, float | None]
    joules_per_token: float | None
    usd_per_million_tokens: float | None
    stages: Sequence[StageFacts] = ()


@dataclass(slots=True)
class StepTimes:
    """Steps that one device of the run has counted, by all attempts: how many, how long together, and by bucket."""

    steps: float = 0.0
    seconds: float = 0.0
    buckets: Sequence[float] = field(default_factory=lambda: [0.0] * (len(STEP_BUCKETS_SECONDS) + 1))


class RunMetrics:
    """Series of one driver's life. Methods are called by the driver as things happen, `families` by scrapes."""

    def __init__(
        self,
        run: str,
        *,
        run_id: str,
        steps: int,
        checkpoint_every: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._run, self._run_id, self._now = {"run": run}, run_id, now
        self._lock = threading.Lock()
        self._series = Series()
        self._plan: PlanFacts | None = None
        self._scale = 1.0
        self._began = now()
        self._first_step_at: float | None = None
        self._times = StepTimes()
        self._recent: deque[tuple[float, float]] = deque(
            maxlen=_WINDOW_STEPS + 1
        )  # (steps, seconds) heard of
        self._series.set("hethub_build_info", 1.0, {"version": __version__, "role": "driver"})
        for entry in METRICS.values():
            if entry.scope == Scope.RUN and entry.kind == "counter" and not entry.optional:
                self._series.zero(entry.name, self._run)
        self._set("hethub_run_start_timestamp_seconds", self._began)
        self._set("hethub_last_step_timestamp_seconds", self._began)
        self._set("hethub_run_steps", steps)
        self._set("hethub_run_step", 0)
        if checkpoint_every is not None:
            self._set("hethub_checkpoint_interval_steps", checkpoint_every)
        self.state("starting")

    def _set(self, name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            self._series.set(name, float(value), {**self._run, **labels})

    def _add(self, name: str, amount: float, **labels: str) -> None:
        self._series.add(name, amount, {**self._run, **labels})

    # -- what happens --------------------------------------------------------------------------------------------------

    def state(self, state: str) -> None:
        """The run is in one of `RUN_STATES` now."""
        with self._lock:
            self._series.zero("hethub_run_state", self._run)
            for known in METRICS["hethub_run_state"].values["state"]:
                self._set("hethub_run_state", known == state, state=known)

    def plan(self, plan: PlanFacts, *, time_scale: float, attempt: int) -> None:
        """An attempt begins with a plan; `time_scale` is wall seconds per modelled second."""
        with self._lock:
            self._plan, self._scale = plan, time_scale
            for entry in METRICS.values():
                if entry.scope == Scope.STAGE or entry.name == "hethub_run_info":
                    self._series.drop(entry.name)
            self._set(
                "hethub_run_info",
                1.0,
                run_id=self._run_id,
                plan=plan.digest[:12],
                model=plan.model,
                precision=plan.precision,
                objective=plan.objective,
                cluster=plan.cluster,
                emulated=str(plan.emulated).lower(),
                devices=str(plan.devices),
            )
            self._set("hethub_run_attempt", attempt)
            self._set("hethub_time_scale_ratio", time_scale)
            self._set("hethub_predicted_step_seconds", plan.step_seconds * time_scale)
            speed = plan.tokens_per_step / plan.step_seconds / time_scale
            self._set("hethub_predicted_tokens_per_second", speed)
            self._set("hethub_predicted_joules_per_token", plan.joules_per_token)
            self._set("hethub_predicted_usd_per_million_tokens", plan.usd_per_million_tokens)
            if plan.usd_per_million_tokens is not None:
                self._add("hethub_cost_usd_total", 0.0)
            for bound, tokens in plan.bounds.items():
                if tokens:
                    self._set("hethub_bound_tokens_per_second", tokens / time_scale, bound=bound)
            for stage in plan.stages:
                self._stage(stage)

    def _stage(self, stage: StageFacts) -> None:
        place = {
            "pipeline": str(stage.pipeline),
            "stage": str(stage.stage),
            "device_type": stage.device_type,
        }
        self._set("hethub_stage_info", 1.0, **place, layers=stage.layers, recompute=stage.recompute)
        self._set("hethub_stage_devices", stage.devices, **place)
        self._set("hethub_stage_predicted_memory_bytes", stage.peak_bytes, **place)
        for activity, share in stage.predicted.items():
            self._set("hethub_stage_predicted_ratio", share, **place, activity=activity)

    def steps(
        self, reports: Sequence[tuple[int, float, float]], learning_rate: float | None, times: StepTimes
    ) -> None:
        """Steps have ended: (step, loss, gradient norm) of each, counted from 0. `times` is of all steps so far."""
        if not reports:
            return
        with self._lock:
            plan = self._plan
            assert plan is not None
            now = self._now()
            step, loss, norm = reports[-1]
            if self._first_step_at is None:
                self._first_step_at = now
                self._add("hethub_lost_seconds_total", now - self._began, cause="start")
                self._set("hethub_checkpoint_last_success_timestamp_seconds", now)
            self._set("hethub_last_step_timestamp_seconds", now)
            self._set("hethub_run_step", step + 1)
            self._add("hethub_steps_total", len(reports))
            self._add("hethub_tokens_total", len(reports) * plan.tokens_per_step)
            self._add("hethub_samples_total", len(reports) * plan.rows_per_step)
            self._set("hethub_loss", loss)
            self._set("hethub_gradient_norm", norm)
            self._set("hethub_learning_rate", learning_rate)
            self._take_times(plan, times)

    def _take_times(self, plan: PlanFacts, times: StepTimes) -> None:
        """Figures of the last steps, and what the time since the last look has cost."""
        spent = max(0.0, times.seconds - self._times.seconds)
        self._times = times
        self._recent.append((times.steps, times.seconds))
        if plan.usd_per_million_tokens is not None:
            # Devices are paid for by the hour: a step that takes longer than predicted costs more in proportion.
            usd = plan.usd_per_million_tokens / 1e6 * plan.tokens_per_step / plan.step_seconds
            self._add("hethub_cost_usd_total", usd * spent / self._scale)
        (first, since), (last, until) = self._recent[0], self._recent[-1]
        if last <= first or until <= since:
            return
        speed = (last - first) * plan.tokens_per_step / (until - since) * self._scale
        for bound, tokens in plan.bounds.items():
            if tokens:
                self._set("hethub_bound_share_ratio", speed / tokens, bound=bound)
        if plan.peak_flops_per_second is not None:
            self._set("hethub_mfu_ratio", speed * plan.model_flops_per_token / plan.peak_flops_per_second)

    def evaluated(self, loss: float) -> None:
        """Held-out rows have been looked at."""
        with self._lock:
            self._set("hethub_held_out_loss", loss)

    def checkpoint(self, step: int, seconds: float, stall_seconds: float) -> None:
        """A checkpoint after so many steps is complete; training stood still for `stall_seconds`."""
        with self._lock:
            self._add("hethub_checkpoints_total", 1, result="made")
            self._add("hethub_lost_seconds_total", stall_seconds, cause="checkpoint")
            self._set("hethub_checkpoint_duration_seconds", seconds)
            self._set("hethub_checkpoint_last_success_timestamp_seconds", self._now())
            self._set("hethub_checkpoint_last_success_step", step)

    def checkpoint_failed(self) -> None:
        """A checkpoint was given up."""
        with self._lock:
            self._add("hethub_checkpoints_total", 1, result="failed")

    def failed(self, cause: str, *, restarts: bool) -> None:
        """An attempt has failed."""
        with self._lock:
            self._add("hethub_faults_total", 1, kind=cause)
            self._add("hethub_restarts_total", float(restarts))
        self.state("recovering" if restarts else "failed")

    def recovered(self, cause: str, seconds: float) -> None:
        """A step that no attempt before had done has ended, so long after the last such one. Before the first step of
        all, that time counts as the start's."""
        with self._lock:
            if self._first_step_at is not None:
                self._add("hethub_lost_seconds_total", seconds, cause=cause)

    # -- scrapes -----------------------------------------------------------------------------------------------------

    def families(self) -> Iterable[Family]:
        """Everything, as of now."""
        with self._lock:
            self._set("hethub_goodput_ratio", self._goodput())
            histogram = Histogram(STEP_BUCKETS_SECONDS)
            histogram.counts = [int(count) for count in self._times.buckets]
            histogram.sum = self._times.seconds
            self._series.set("hethub_step_duration_seconds", histogram, self._run)
            return list(self._series.families())

    def _goodput(self) -> float:
        elapsed = self._now() - self._began
        if self._first_step_at is None or elapsed <= 0:
            return 0.0
        lost = sum(
            self._series.get("hethub_lost_seconds_total", {**self._run, "cause": cause}) or 0.0
            for cause in METRICS["hethub_lost_seconds_total"].values["cause"]
        )
        return min(1.0, max(0.0, 1.0 - lost / elapsed)) if not math.isnan(lost) else 0.0
