"""Really unequal devices: CPU workers under quotas of a core (Linux control groups, version 1 or 2; needs root).

A period of 10 ms keeps the pauses short beside an action, so that a worker under a quota of 0.3 is a core of 0.3 of the
speed. Waiting costs no quota, since a blocked process does not run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from hethub.specs.plan import Plan

from .crew import Crew
from .engines import Ours, Repetition, Training, spread, take, text_of
from .plans import cpu_cluster, data_parallel, llama_model

__all__ = [
    "CORES",
    "MICRO_BATCHES",
    "QUOTA_ERROR",
    "Cores",
    "CpuQuotas",
    "NoQuotasError",
    "QuotaCheck",
    "check_quotas",
    "core_shares",
    "cpu_quota_share",
    "cut_rows",
    "mixed_plan",
    "settled_quotas",
    "why_no_quotas",
]

PERIOD_MICROSECONDS = 10_000
_PREFIX = "hethub-bench-"  # of our control groups; the number of the process that made them follows
Cores = tuple[tuple[str, float, int], ...]  # name, share of a core, how many
CORES: Cores = (("fast", 0.6, 2), ("middle", 0.3, 1), ("slow", 0.15, 1))
QUOTA_ERROR = 0.02
_REPETITIONS = 9
_STEPS = 1
_CHECKS = 6
_SPIN_SECONDS = 10.0  # in 3 a pause of 30 ms is 7 % of what the slowest worker does, a clock tick 2 %

# Sizes at which the slowest worker's smallest action, the forward pass of its 8 rows, takes over 200 ms of CPU.
MODEL = llama_model(hidden=256, layers=4, heads=4)
SEQUENCE = 256
ROWS = 88  # of a micro-batch: 32 + 32 + 16 + 8 by speed, 22 each when even
# Moving gradients and weights takes CPU time too, the slowest worker's above all; and all wait once a step for whoever
# was held up in it, which evens out over a longer one.
MICRO_BATCHES = 6


class NoQuotasError(Exception):
    """CPU quotas cannot be set here; the text says why."""


def core_shares(cores: Cores = CORES) -> list[float]:
    """The quota of each worker, in the order of the cluster's devices."""
    return [share for _, share, count in cores for _ in range(count)]


# -- control groups ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """Where groups with CPU quotas are made, and in which version's words."""

    parent: Path
    version: int

    def prefer(self, group: Path) -> None:
        """Let nothing else on the machine take what a group may have: the largest weight there is."""
        if self.version == 1:
            (group / "cpu.shares").write_text("262144")
        else:
            (group / "cpu.weight").write_text("10000")

    def limit(self, group: Path, share: float) -> None:
        quota = round(share * PERIOD_MICROSECONDS)
        if self.version == 1:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_MICROSECONDS))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD_MICROSECONDS}")


def _hierarchy() -> _Hierarchy:
    """Version 1's `cpu` hierarchy where one is mounted, else version 2's. Raises NoQuotasError."""
    if not Path("/proc/self/mounts").exists():
        raise NoQuotasError("CPU quotas need Linux's control groups")
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, where, kind, options, *_ in mounts:
        if kind == "cgroup" and "cpu" in options.split(","):
            return _Hierarchy(Path(where), 1)
    for _, where, kind, *_ in mounts:
        if kind == "cgroup2" and "cpu" in (Path(where) / "cgroup.controllers").read_text().split():
            return _Hierarchy(Path(where), 2)
    raise NoQuotasError("no control group hierarchy with the cpu controller is mounted")


def _remove_left_over(parent: Path) -> None:
    """Groups of benchmarks that were killed: the process that made them is gone."""
    for top in parent.glob(f"{_PREFIX}*"):
        if not Path(f"/proc/{top.name.removeprefix(_PREFIX)}").exists():
            _remove_groups(top)


def _remove_groups(top: Path) -> None:
    for group in (*top.glob("worker-*"), top):
        if group.is_dir():
            group.rmdir()


class CpuQuotas:
    """A control group for each share of a core; as a context, it removes them. Raises NoQuotasError.

    End the processes first: a group with a living process cannot be removed.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._hierarchy = _hierarchy()
        _remove_left_over(self._hierarchy.parent)
        self._top = self._hierarchy.parent / f"{_PREFIX}{os.getpid()}"
        self.groups = [self._top / f"worker-{i}" for i in range(len(shares))]
        try:
            self._top.mkdir()
            if self._hierarchy.version == 2:
                for folder in (self._hierarchy.parent, self._top):
                    (folder / "cgroup.subtree_control").write_text("+cpu")
            self._hierarchy.prefer(self._top)
            for group, share in zip(self.groups, shares, strict=True):
                group.mkdir()
                self._hierarchy.prefer(group)
                self._hierarchy.limit(group, share)
        except OSError as error:
            self.remove()
            raise NoQuotasError(f"{error.filename}: {error.strerror}; quotas need root") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def place(self, crew: Crew, numbers: Sequence[int]) -> None:
        """Put process i of a crew, all its threads, under the quota of worker numbers[i]."""
        for process, number in zip(crew.processes, numbers, strict=True):
            (self.groups[number] / "cgroup.procs").write_text(str(process.pid))

    def remove(self) -> None:
        """Remove the groups."""
        _remove_groups(self._top)


def why_no_quotas() -> str | None:
    """Why CPU quotas cannot be set here; None where they can."""
    try:
        CpuQuotas([0.5]).remove()
    except NoQuotasError as error:
        return str(error)
    return None


# -- do the quotas hold? -----------------------------------------------------------------------------------


class _Spinner:
    """Counts matrix products."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._matrix = torch.randn(256, 256)

    def spin(self, seconds: float) -> float:
        """Products per second."""
        count, begin = 0, time.monotonic()
        while time.monotonic() - begin < seconds:
            self._matrix @ self._matrix
            count += 1
        return count / (time.monotonic() - begin)


@dataclass(frozen=True, slots=True)
class QuotaCheck:
    """Four workers that spin at once: what each got of a core over its quota, and its part of the whole throughput over
    its part of all quotas, both less 1.

    The first is what quotas promise, and is held to QUOTA_ERROR. The second also tells how unlike the machine's cores
    are: pinned to one each, workers of one quota were seen to differ by 20 % in what a second of CPU time does here.
    """

    time_errors: list[float]
    speed_errors: list[float]

    @property
    def holds(self) -> bool:
        """Whether every worker got its quota of CPU time."""
        return max(map(abs, self.time_errors)) <= QUOTA_ERROR


def check_quotas(quotas: CpuQuotas, shares: Sequence[float], seconds: float = _SPIN_SECONDS) -> QuotaCheck:
    """Let a worker spin under every quota for so long, three times; the median of each counts."""
    times, speeds = [], []
    with Crew([_Spinner] * len(shares)) as crew:
        quotas.place(crew, range(len(shares)))
        crew.call("spin", seconds / 4)
        for _ in range(3):
            before, begin = crew.cpu_seconds_each(), time.monotonic()
            rates = crew.call("spin", seconds)
            wall = time.monotonic() - begin
            spent = np.subtract(crew.cpu_seconds_each(), before)
            times.append(spent / wall / shares - 1)
            speeds.append(np.divide(rates, sum(rates)) / np.divide(shares, sum(shares)) - 1)
    return QuotaCheck(np.median(times, axis=0).tolist(), np.median(speeds, axis=0).tolist())


def settled_quotas(quotas: CpuQuotas, shares: Sequence[float]) -> QuotaCheck:
    """The first check that holds, of a few: what else runs on the machine may be over soon. If none does, the last."""
    for _ in range(_CHECKS):
        check = check_quotas(quotas, shares)
        print(
            f"CPU time over quota, less 1: {', '.join(f'{error:+.3f}' for error in check.time_errors)}",
            flush=True,
        )
        if check.holds:
            break
    return check


# -- the mixed run against the types' own ------------------------------------------------------------------


def cut_rows(rows: int, shares: Sequence[float]) -> list[int]:
    """Rows by speed. Raises ValueError where they do not come out whole."""
    cut = [rows * share / sum(shares) for share in shares]
    if any(abs(part - round(part)) > 1e-9 for part in cut):
        raise ValueError(f"{rows} rows do not divide by speed: {cut}")
    return [round(part) for part in cut]


def mixed_plan(micro_batches: int = MICRO_BATCHES) -> Plan:
    """All workers, each with the whole model, rows by speed."""
    return data_parallel(cpu_cluster(CORES), MODEL, SEQUENCE, cut_rows(ROWS, core_shares()), micro_batches)


def own_plans() -> dict[str, tuple[Plan, list[int]]]:
    """By type: its own plan for its part of the batch, and the numbers of its workers."""
    found: dict[str, tuple[Plan, list[int]]] = {}
    rows, first = cut_rows(ROWS, core_shares()), 0
    for core in CORES:
        numbers = list(range(first, first + core[2]))
        plan = data_parallel(cpu_cluster([core]), MODEL, SEQUENCE, [rows[i] for i in numbers], MICRO_BATCHES)
        found[core[0]] = plan, numbers
        first += core[2]
    return found


@dataclass(frozen=True, slots=True)
class _Run:
    """An engine under quotas, its rows of a step, and the share of a core that all its workers have together."""

    engine: Ours
    rows: int
    cores: float

    def tokens_per_second(self, repetition: Repetition) -> float:
        return self.rows * SEQUENCE * len(repetition.losses) / repetition.seconds

    def cpu_use(self, repetition: Repetition) -> float:
        """CPU time taken over the quota: what is missing to 1 was spent waiting."""
        return repetition.cpu_seconds / (repetition.seconds * self.cores)


def _run(stack: ExitStack, quotas: CpuQuotas, plan: Plan, numbers: Sequence[int], text: Path) -> _Run:
    """Start at full speed, then go under the quotas."""
    engine = stack.enter_context(Ours(plan, Training(workload=plan.workload, tokens_file=text)))
    quotas.place(engine.crew, numbers)
    shares = core_shares()
    return _Run(engine, plan.workload.global_batch, sum(shares[i] for i in numbers))


def cpu_quota_share(repetitions: int = _REPETITIONS) -> tuple[dict[str, float], dict[str, Any]]:
    """Tokens per second of one job over all workers, over the sum of what each type reaches alone, all types at once so
    that the machine is loaded alike.

    Returns the figures `homogeneous_share_cpu_quota` (the median of the repetitions) and `quota_error` (the largest, of
    CPU time, as the run measured it; past QUOTA_ERROR the workers were not what they should be), and the repetitions
    behind them. Without control groups there are no figures, and `skipped` says why.
    """
    reason = why_no_quotas()
    if reason is not None:
        return {}, {"skipped": reason}
    with ExitStack() as stack:
        text = text_of(Path(stack.enter_context(TemporaryDirectory(prefix="hethub-bench-"))))
        quotas = stack.enter_context(CpuQuotas(core_shares()))
        check = settled_quotas(quotas, core_shares())
        mixed = _run(stack, quotas, mixed_plan(), range(len(core_shares())), text)
        own = {
            name: _run(stack, quotas, plan, numbers, text) for name, (plan, numbers) in own_plans().items()
        }
        _side_by_side(own, 1)
        take(mixed.engine, 1)
        raws = [_compare(mixed, own, swapped=bool(i % 2)) for i in range(repetitions)]
    shares = [raw["share"] for raw in raws]
    figures = {
        "homogeneous_share_cpu_quota": spread(shares)["median"],
        "quota_error": max(map(abs, check.time_errors)),
    }
    return figures, {"quotas": asdict(check), "share": spread(shares), "repetitions": raws}


def _side_by_side(own: dict[str, _Run], steps: int) -> dict[str, Repetition]:
    for run in own.values():
        run.engine.start(steps)
    return {name: run.engine.finish() for name, run in own.items()}


def _compare(mixed: _Run, own: dict[str, _Run], *, swapped: bool) -> dict[str, Any]:
    """One repetition of both, in either order."""
    alone = _side_by_side(own, _STEPS) if swapped else None
    together = take(mixed.engine, _STEPS)
    alone = alone or _side_by_side(own, _STEPS)
    reached = {name: run.tokens_per_second(alone[name]) for name, run in own.items()}
    return {
        "share": mixed.tokens_per_second(together) / sum(reached.values()),
        "mixed_tokens_per_second": mixed.tokens_per_second(together),
        "own_tokens_per_second": reached,
        "mixed_cpu_use": mixed.cpu_use(together),
        "own_cpu_use": {name: run.cpu_use(alone[name]) for name, run in own.items()},
        "mixed_cpu_seconds": together.cpu_seconds,
        "own_cpu_seconds": sum(repetition.cpu_seconds for repetition in alone.values()),
        "mixed_losses": together.losses,
    }
