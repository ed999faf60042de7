"""The driver: from a job to a finished run folder. Planner and simulator decide; only this module acts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hethub import __version__
from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.data.batches import Batches
from hethub.data.token_file import TokenFile, open_token_file, token_file_for
from hethub.data.tokenizers import load_tokenizer
from hethub.data.unigram import unigram_loss
from hethub.errors import InputError
from hethub.launch.beacon import Beacon
from hethub.launch.crew import Crew
from hethub.launch.faults import join_faults, plan_faults
from hethub.launch.history import HistorySettings, check_history, read_history
from hethub.launch.links import LinkTable
from hethub.launch.progress import Progress
from hethub.launch.run_folder import RunFolder, write_json
from hethub.launch.stall import StallWatch, where
from hethub.planners.answer import answer
from hethub.planners.even import EvenPlanner
from hethub.planners.interface import Problem
from hethub.program.actions import Program
from hethub.program.check import require_valid, same_cluster
from hethub.program.compile import compile_program
from hethub.program.memory import program_memory
from hethub.program.prove import prove
from hethub.simulate.engine import simulate
from hethub.simulate.modelled import Modelled
from hethub.simulate.report import figures
from hethub.specs.job import Job
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan, load_plan, save_plan
from hethub.timeline.gantt import write_gantt
from hethub.timeline.record import Kind, Timeline
from hethub.timeline.summary import DeviceSummary, step_seconds, summarize
from hethub.timeline.trace import write_chrome_trace

__all__ = ["Finished", "RunOutcome", "launch"]

REAL_MATH_SHARE = 0.04  # of the fastest device's padded time, which `time_scale: auto` aims at
_STEADY_ACTIONS = 50_000  # up to this many per step, the step between two others is predicted
_REHEARSAL_STEPS = 4
_WARM_STEPS = 3  # not counted in the median step
HISTORY = "history"  # folder of the run folder: what every worker trained on
_PEER_TIMEOUT_SECONDS = 600.0  # of the transports; who is stuck is told long before
_JOIN_SECONDS = 8.0  # for all workers to meet once they have imported what they need, and for each of them
_JOIN_SECONDS_PER_WORKER = 0.1
_SILENT_SECONDS = 8.0  # a process that answers nothing for so long is stopped or hung
_PING_SECONDS = 1.0
# Parts of a start, in order. `plan` is all before the workers: tokens, plan, program, prediction. `rehearsal` is there
# for `time_scale: auto` alone, so it is no part of `start_seconds`, as the first step itself is none.
_LAPS = ("plan", "ray", "import", "join", "rehearsal")
_START = ("plan", "ray", "import", "join", "load")
_SILENT_WORDS = "; the process is stopped or hung. Continue or replace it, and run again"
_STUCK_WORDS = "; the process answers, the action does not end. Look into its log for what it waits for"


@dataclass(frozen=True)
class _Compiled:
    """A plan, its programs, and what the simulator says of it."""

    plan: Plan
    graph: CostGraph
    program: Program
    evaluation: Program
    predicted: Timeline
    predicted_step_seconds: float
    figures: dict[str, Any]

    @cached_property
    def action_seconds(self) -> Mapping[tuple[int, int], float]:
        """(device, action) -> predicted seconds; of a receive: from the message's sending to its arrival."""
        records = self.predicted.records
        records = records[(records["step"] == 0) & (records["kind"] != Kind.COLLECTIVE)]
        since = np.where(np.isnan(records["sent"]), records["start"], records["sent"])
        keys = zip(records["device"].tolist(), records["action"].tolist(), strict=True)
        return dict(zip(keys, (records["end"] - since).tolist(), strict=True))

    def seconds(self, device: int, action: int) -> float:
        """Predicted seconds of an action of the training program."""
        return self.action_seconds.get((device, action), 0.0)

    def longest_seconds(self, device: int, action: int) -> float:
        """Predicted seconds of any action, at most: for evaluation, which has no prediction of its own."""
        return max(self.action_seconds.values())

    @cached_property
    def peak_bytes(self) -> Mapping[int, int]:
        """Predicted peak memory by device."""
        compute = ComputeModel(CostGraph(self.plan.cluster), self.plan.workload)
        return {device: peak.total for device, peak in program_memory(self.program, compute).items()}


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """One plan's run: per step loss and norm, its timeline, the held-out loss (None without held-out rows), and each
    device's peak memory where it is counted."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    timeline: Timeline
    held_out: tuple[tuple[int, float], ...]
    step_seconds: float
    peak_bytes: Mapping[int, int | None]


def _compile(plan: Plan) -> _Compiled:
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    program = compile_program(lay_out(plan), compute)
    prove(program)
    small = sum(len(actions) for actions in program.devices) <= _STEADY_ACTIONS
    simulation = simulate(program, compute, steps=3 if small else 1)
    modelled = Modelled(
        layout=program.layout,
        compute=compute,
        ownership=program.ownership,
        program=program,
        simulation=simulation,
    )
    evaluation = compile_program(program.layout, compute, ownership=program.ownership, training=False)
    prove(evaluation)
    assert simulation.timeline is not None
    return _Compiled(
        plan,
        compute.graph,
        program,
        evaluation,
        simulation.timeline,
        simulation.step_seconds,
        figures(plan, modelled),
    )


def choose_plans(job: Job) -> tuple[Plan, Plan | None]:
    """The plan to train with, searched or read and checked, and the even one where the job compares.

    Raises InputError for a plan file that is not valid or not of the job's cluster and workload, InfeasibleError when
    nothing fits.
    """
    if job.plan is None:
        found = answer(job.cluster, job.workload)
        return found.plan, found.even.plan if found.even and job.compare_even_steps else None
    plan, document = load_plan(job.plan)
    differences = same_cluster(plan, job.cluster)
    if plan.workload != job.workload:
        differences.append("its workload is another one")
    if differences:
        raise document.error(
            ("cluster",),
            f"the plan is not for {job.cluster_path}: {'; '.join(differences)}. Run `hethub plan` again.",
        )
    require_valid(plan, document, str(job.plan))
    even = EvenPlanner().search(Problem.of(job.cluster, job.workload)) if job.compare_even_steps else None
    return plan, even.plan if even else None


def _tokens(job: Job, folder: Path) -> tuple[TokenFile, Batches]:
    """The job's tokens, a token file as given or one built in `folder`, and its batches.

    Raises InputError for data that the run could not use.
    """
    files = job.data_files
    if len(files) == 1 and files[0].suffix == ".tokens":
        tokens = open_token_file(files[0])
    else:
        tokens = token_file_for(files, load_tokenizer(job.tokenizer), folder)
    _refuse_vocabulary(job, tokens)
    try:
        batches = Batches(
            tokens.tokens,
            sequence_length=job.workload.sequence_length,
            global_batch=job.workload.global_batch,
            seed=job.seed,
            held_out=job.held_out,
        )
        batches.held_out_rows(0, job.evaluate_rows)
    except InputError as error:
        raise InputError(f"{job.path} {error.message}") from error
    return tokens, batches


def _moved(tokens: TokenFile, source: Path, target: Path) -> TokenFile:
    """A token file that was built in `source`, now in `target`; one that the job gave stays where it is."""
    if tokens.path.parent != source:
        return tokens
    path = target / tokens.path.name
    shutil.move(tokens.path, path)
    return replace(tokens, path=path)


def _refuse_inputs_inside(job: Job) -> None:
    """The run folder is emptied, so nothing that the job reads may lie in it."""
    inputs = (job.path, job.cluster_path, job.plan, job.tokenizer, *job.data_files)
    for path in inputs:
        if isinstance(path, Path) and path.resolve().is_relative_to(job.output.resolve()):
            raise InputError(
                f"{job.output}: output would be emptied, and holds {path}, which the job reads. Name another folder."
            )


@contextlib.contextmanager
def _importing_ahead() -> Iterator[None]:
    """Import what the driver needs of torch while Ray starts, not while all workers import it too.

    The thread is waited for: a process that ends while one of its threads imports is aborted now and then.
    """

    def work() -> None:
        with contextlib.suppress(Exception):  # the import that needs it tells what is wrong
            import hethub.launch.worker  # noqa: F401

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class _Run:
    """A job on its crew: loads plans, trains, evaluates, gathers."""

    def __init__(self, job: Job, crew: Crew, folder: Path, tokens: TokenFile) -> None:
        self.job = job
        self.crew = crew
        self.folder = folder
        self.tokens = tokens
        self.emulated = job.cluster.emulated_time_scale is not None
        self.start: dict[str, float] = {}  # seconds by part of the start
        self.beacon_file = folder / "beacon.bin"
        self.links_file = folder / "links.bin"
        Beacon.create(self.beacon_file, len(job.cluster.devices()))
        self.beacon = Beacon(self.beacon_file, len(job.cluster.devices()))

    def clean(self) -> None:
        """Remove what only a running job needs."""
        self.beacon_file.unlink(missing_ok=True)
        self.links_file.unlink(missing_ok=True)

    def join(self) -> None:
        """Start the one store and let every worker join it. Raises RunError naming those that do not."""
        import torch.distributed as dist

        from hethub.launch.worker import WorkerSetup

        on_join = join_faults(self.job.faults)
        rank_of = {device: rank for rank, device in enumerate(self.crew.devices)}
        host = self.crew.host()
        self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        setups = {
            device: (
                WorkerSetup(
                    device=device,
                    rank_of=rank_of,
                    store_host=host,
                    store_port=self.store.port,
                    timeout_seconds=_PEER_TIMEOUT_SECONDS,
                    on_join=on_join.get(device),
                ),
            )
            for device in self.crew.devices
        }
        self.crew.call("join", setups, watch=self._join_watch(rank_of))

    def _join_watch(self, rank_of: Mapping[int, int]) -> Callable[[Collection[int]], None]:
        from hethub.launch.worker import HERE

        limit = _JOIN_SECONDS + _JOIN_SECONDS_PER_WORKER * len(rank_of)
        begin = time.monotonic()

        def watch(pending: Collection[int]) -> None:
            if not pending or time.monotonic() - begin < limit:
                return
            absent = [d for d in pending if not self.store.check([HERE.format(rank_of[d])])]
            absent = absent or self.crew.silent(pending, _PING_SECONDS) or list(pending)
            names = self.job.cluster.devices()
            others = ", ".join(f"rank {rank_of[d]} ({names[d].name})" for d in absent[1:])
            raise self.crew.failed(
                absent[0],
                "join",
                f"did not join the other {len(rank_of) - len(absent)} workers within {limit:.1f} s"
                + (f", nor did {others}" if others else "")
                + ". Look into its log, and whether its host reaches "
                f"{self.crew.host()} (GLOO_SOCKET_IFNAME names the interface)",
            )

        return watch

    def _load_watch(self) -> Callable[[Collection[int]], None]:
        """Loading takes as long as the model is large, so only a process that answers nothing is given up."""
        next_look = time.monotonic() + _PING_SECONDS

        def watch(pending: Collection[int]) -> None:
            nonlocal next_look
            if not pending or time.monotonic() < next_look:
                return
            silent = self.crew.silent(pending, _PING_SECONDS)
            silent = self.crew.silent(silent, _SILENT_SECONDS - _PING_SECONDS) if silent else []
            if silent:
                raise self.crew.failed(
                    silent[0],
                    "load",
                    f"the process has answered nothing for {_SILENT_SECONDS:.0f} s{_SILENT_WORDS}",
                )
            next_look = time.monotonic() + _PING_SECONDS

        return watch

    def _stall_watch(
        self, program: Program, seconds: Callable[[int, int], float], scale: float
    ) -> Callable[[Collection[int]], None]:
        """Ends the run when a device keeps the others for far longer than predicted."""
        self.beacon.clear()
        watcher = StallWatch(program, self.beacon, lambda d, a: seconds(d, a) * scale, emulated=self.emulated)
        self.crew.explain = lambda device: where(program, device, self.beacon.get(device))

        def watch(pending: Collection[int]) -> None:
            stall = watcher.look(pending)
            if stall is None:
                return
            silent = self.crew.silent(stall.members or (stall.device,), _PING_SECONDS)
            device = silent[0] if silent else stall.device
            names = self.job.cluster.devices()
            waiting = ", ".join(names[d].name for d in stall.waiting if d != device) or "nobody"
            raise self.crew.failed(
                device,
                self.crew.explain(device),
                f"no progress for {stall.seconds:.1f} s where {stall.predicted_seconds:.3g} s are predicted "
                f"(waiting: {waiting})" + (_SILENT_WORDS if silent else _STUCK_WORDS),
            )

        return watch

    def load(self, compiled: _Compiled, total_steps: int, history: HistorySettings | None = None) -> None:
        """Give every worker its part of a plan, from the initial weights on.

        With `history` this is the training that the job asks for: it is recorded, and the job's faults are done in it.
        """
        from hethub.launch.worker import Task

        job = self.job
        if self.emulated:
            LinkTable.create(self.links_file, CostGraph(job.cluster).cell_count)
        task = Task(
            graph=compiled.graph,
            workload=compiled.plan.workload,
            program=compiled.program,
            evaluation=compiled.evaluation,
            settings=job.optimizer,
            seed=job.seed,
            total_steps=total_steps,
            tokens_file=self.tokens.path,
            held_out=job.held_out,
            links_file=self.links_file if self.emulated else None,
            beacon_file=self.beacon_file,
            history=history,
            peak_bytes=compiled.peak_bytes,
            faults=() if history is None else plan_faults(job.faults, compiled.program, compiled.seconds),
        )
        self.crew.explain = lambda device: "load"
        self.crew.call("load", (task,), watch=self._load_watch())

    def time_scale(self, plans: Sequence[_Compiled]) -> float:
        """Wall seconds per modelled second: 1 on real devices; where it is `auto`, the smallest at which every device's
        real math is at most REAL_MATH_SHARE of its time under each of the plans."""
        wanted = self.job.cluster.emulated_time_scale
        if wanted is None:
            return 1.0
        if wanted != "auto":
            return float(wanted)
        scale = 0.0
        for compiled in reversed(plans):
            self.load(compiled, 1)
            # One group at a time: in the run, too, most of the others wait for their deadlines.
            for group in sorted(set(compiled.program.groups.values())):
                for real, predicted in self.crew.call("time_stages", devices=group).values():
                    scale = max(scale, real / (REAL_MATH_SHARE * predicted))
        return self._rehearse(plans[0], scale)

    def _rehearse(self, compiled: _Compiled, scale: float) -> float:
        """Raise the scale by what the real math of a step takes longer when all workers share this machine.

        The median of a few steps, so that a passing load of something else does not slow the whole run.
        """
        self.crew.call("start_clock", (time.monotonic(), scale))
        watch = self._stall_watch(compiled.program, compiled.seconds, scale)
        self.crew.call("train", (0, _REHEARSAL_STEPS), watch=watch)
        timeline = self._timeline(compiled, scale)
        shares = [max(d.real_ratio for d in summarize(timeline, n, n)) for n in range(1, _REHEARSAL_STEPS)]
        return scale * max(1.0, statistics.median(shares) / REAL_MATH_SHARE)

    def train(
        self,
        compiled: _Compiled,
        steps: int,
        total_steps: int,
        scale: float,
        title: str,
        *,
        recorded: bool = False,
    ) -> RunOutcome:
        """Train `steps` steps of a run of `total_steps`, evaluating as the job says where that is the whole run.
        The one that is `recorded` is the training that the job asks for: it has the history, and the job's faults.

        Evaluation stands outside the timeline: the clock goes on where the last training step ended.
        """
        whole = steps == total_steps
        begin = time.monotonic()
        self.load(compiled, total_steps, self._history() if recorded else None)
        self.start.setdefault("load_seconds", time.monotonic() - begin)
        workload = compiled.plan.workload
        root = compiled.program.layout.used[0]
        tokens = workload.global_batch * workload.sequence_length
        progress = Progress(title, steps, tokens, compiled.predicted_step_seconds, scale, self.emulated)
        reports: list[tuple[int, float, float]] = []
        held_out: list[tuple[int, float]] = []
        modelled = 0.0
        for first, last in _segments(steps, self.job.evaluate_every if whole else 0):
            stall = self._stall_watch(compiled.program, compiled.seconds, scale)
            modelled = self._train_segment(first, last, modelled, scale, root, reports, progress, stall)
            if self.job.evaluate_rows and whole:
                stall = self._stall_watch(compiled.evaluation, compiled.longest_seconds, scale)
                means = self.crew.call("evaluate", (self.job.evaluate_rows,), watch=stall)
                held_out.append((last, float(means[root])))
        timeline = self._timeline(compiled, scale)
        losses, norms = [loss for _, loss, _ in reports], [norm for _, _, norm in reports]
        return RunOutcome(
            tuple(losses),
            tuple(norms),
            timeline,
            tuple(held_out),
            median_step_seconds(timeline, held_out),
            self.crew.call("peak_bytes"),
        )

    def _history(self) -> HistorySettings:
        folder = self.folder / HISTORY
        folder.mkdir()
        plan = hashlib.sha256((self.folder / "plan.yaml").read_bytes()).hexdigest()
        return HistorySettings(
            folder=folder, run=self.job.output.name, attempt=1, plan=plan, digest_every=self.job.digest_every
        )

    def _train_segment(
        self,
        first: int,
        last: int,
        modelled: float,
        scale: float,
        root: int,
        reports: list[tuple[int, float, float]],
        progress: Progress,
        stall: Callable[[Collection[int]], None],
    ) -> float:
        """Steps [first, last), the clock starting at `modelled` seconds; returns what it shows at the end."""
        if self.emulated:
            LinkTable.clear(self.links_file)
        self.crew.call("start_clock", (time.monotonic() - modelled * scale, scale))
        progress.start()
        before = len(reports)
        begin = time.monotonic()

        def look(timeout_seconds: float) -> None:
            fresh = self.crew.results(root, len(reports) - before, timeout_seconds)
            reports.extend(fresh)
            progress.update(fresh)
            if reports:
                self.start.setdefault("first_step_seconds", time.monotonic() - begin)

        def watch(pending: Collection[int]) -> None:
            look(_PING_SECONDS / 2)
            stall(pending)

        ends = self.crew.call("train", (first, last), watch=watch)
        look(_SILENT_SECONDS)
        return float(max(ends.values()))

    def _timeline(self, compiled: _Compiled, scale: float) -> Timeline:
        parts = self.crew.call("records")
        info = replace(compiled.predicted.info, origin="measured", time_scale=scale)
        return Timeline(info, np.concatenate([parts[device] for device in sorted(parts)]))

    def save_weights(self, compiled: _Compiled, path: Path) -> None:
        """Write the whole model, Hugging Face names, as one safetensors file."""
        from safetensors.numpy import save_file

        from hethub.launch.worker import assemble

        owned = self.crew.call("owned_weights")
        whole = assemble(compiled.program, [owned[device] for device in sorted(owned)])
        temporary = path.with_name(path.name + ".tmp")
        save_file(whole, str(temporary), metadata={"format": "pt"})
        temporary.rename(path)


def _segments(steps: int, every: int) -> list[tuple[int, int]]:
    """[first, last) ranges between evaluations; 0 means none in between."""
    stride = every or steps
    return [(first, min(first + stride, steps)) for first in range(0, steps, stride)]


def median_step_seconds(timeline: Timeline, held_out: Sequence[tuple[int, float]]) -> float:
    """Median over the steps after the third, leaving out those that begin with an evaluation before them."""
    seconds = step_seconds(timeline)
    after_evaluation = {step for step, _ in held_out}
    warm = min(_WARM_STEPS, len(seconds) - 1)
    counted = [s for i, s in enumerate(seconds) if i >= warm and i not in after_evaluation]
    return float(statistics.median(counted or seconds[-1:]))


def _summary(
    run: RunOutcome, compiled: _Compiled, scale: float, unigram: float | None, steps: int
) -> dict[str, Any]:
    """The figures of one run; tokens per second and shares are in modelled time where devices are emulated."""
    workload = compiled.plan.workload
    tokens = workload.global_batch * workload.sequence_length
    devices = summarize(run.timeline, min(_WARM_STEPS, steps - 1), steps - 1)
    used = [devices[d] for d in compiled.program.layout.used]
    speed = tokens / run.step_seconds
    bound = compiled.figures["bounds"]["homogeneous_tokens_per_second"]
    physical = compiled.figures["bounds"]["physical_tokens_per_second"]
    return {
        "steps": steps,
        "loss_first": run.losses[0],
        "loss_last": run.losses[-1],
        "heldout_loss": run.held_out[-1][1] if run.held_out else None,
        "unigram_loss": unigram,
        "step_seconds": run.step_seconds,
        "predicted_step_seconds": compiled.predicted_step_seconds,
        "tokens_per_second": speed,
        "predicted_tokens_per_second": tokens / compiled.predicted_step_seconds,
        "wall_tokens_per_second": speed / scale,
        "share_of_prediction": compiled.predicted_step_seconds / run.step_seconds,
        "share_of_homogeneous_bound": speed / bound if bound else None,
        "share_of_physical_bound": speed / physical,
        "busy_ratio": statistics.fmean(d.busy_ratio for d in used),
        "emulated": compiled.plan.cluster.emulated_time_scale is not None,
        "time_scale": scale,
        "overrun_ratio": _weighted(used, "overrun_ratio"),
        "real_math_ratio": max(d.real_ratio for d in used),
        "unaccounted_ratio": max(d.unaccounted_ratio for d in used),
        "devices": [asdict(d) for d in devices],
        "peak_bytes": {
            devices[d].device: {"predicted": peak, "measured": run.peak_bytes.get(d)}
            for d, peak in compiled.peak_bytes.items()
        },
    }


def _weighted(devices: Sequence[DeviceSummary], ratio: str) -> float:
    """Mean over devices, each counting by its actions."""
    total = sum(d.actions for d in devices)
    return sum(float(getattr(d, ratio)) * d.actions for d in devices) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class Finished:
    """What a launch hands to the command line: the summaries as written, the even one's None without a comparison."""

    folder: Path
    summary: dict[str, Any]
    even: dict[str, Any] | None
    losses_differ: float | None  # largest relative difference between the two runs' losses, step by step


def launch(job: Job, say: Callable[[str], None]) -> Finished:
    """Run a job to its end: plan, train, evaluate, save. `say` takes lines for a person.

    Everything is checked before the first file is written. The run folder then holds plan.yaml, logs, predicted.npz and
    measured.npz, trace.json, timeline.html, model.safetensors and last of all summary.json. Raises InputError,
    InfeasibleError, MachineError, or RunError when a worker fails.
    """
    begin = time.monotonic()
    _refuse_precision(job)
    folder = RunFolder(job.output)
    folder.check()
    _refuse_inputs_inside(job)
    with tempfile.TemporaryDirectory(prefix="hethub-data-") as scratch:
        tokens, batches = _tokens(job, Path(scratch))
        plan, even_plan = choose_plans(job)
        compiled = _compile(plan)
        even = None if even_plan is None else _compile(even_plan.model_copy(update={"bounds": plan.bounds}))
        # Faults that the plan has no place for are told before anything is written.
        plan_faults(job.faults, compiled.program, compiled.seconds)
        folder.open({"hethub": __version__, "job": str(job.path.name), "started_unix_seconds": time.time()})
        tokens = _moved(tokens, Path(scratch), folder.path)
    try:
        return _run(job, folder.path, compiled, even, tokens, batches, say, begin)
    finally:
        folder.close()


def _refuse_precision(job: Job) -> None:
    """fp16 needs loss scaling, and transfers do not convert between dtypes: planned for, not run yet."""
    used = {
        device.type.name: device.type.dtype_for(job.workload.precision) for device in job.cluster.devices()
    }
    for name, dtype in used.items():
        if dtype == "fp16":
            raise InputError(
                f"{job.cluster_path}: {name} would train in fp16, which is planned but not run yet. "
                "Set the workload's precision to fp32."
            )
    if len(set(used.values())) > 1:
        listed = ", ".join(f"{name} in {dtype}" for name, dtype in used.items())
        raise InputError(
            f"{job.cluster_path}: one run has one dtype for now, this one would have {listed}. "
            "Set a precision that all device types have."
        )


def _run(
    job: Job,
    folder: Path,
    compiled: _Compiled,
    even: _Compiled | None,
    tokens: TokenFile,
    batches: Batches,
    say: Callable[[str], None],
    begin: float,
) -> Finished:
    unigram = unigram_loss(batches, job.evaluate_rows) if job.evaluate_rows else None
    save_plan(compiled.plan, folder / "plan.yaml")
    compiled.predicted.save(folder / "predicted.npz")
    plans = [compiled] if even is None else [compiled, even]
    devices = sorted({device for c in plans for device in c.program.layout.used})
    say(f"{len(devices)} workers start; logs in {folder / 'logs'}")
    laps = [begin, time.monotonic()]
    with _importing_ahead(), Crew(job.cluster, devices, folder / "logs", job.ray_address) as crew:
        run = _Run(job, crew, folder, tokens)
        try:
            laps.append(time.monotonic())
            crew.prepare()
            laps.append(time.monotonic())
            run.join()
            laps.append(time.monotonic())
            scale = run.time_scale(plans)
            laps.append(time.monotonic())
            run.start = {f"{part}_seconds": b - a for part, (a, b) in zip(_LAPS, pairwise(laps), strict=True)}
            say(f"workers ready after {laps[-1] - laps[1]:.1f} s" + _scale_words(run.emulated, scale))
            title = "uneven" if even else "train"
            outcome = run.train(compiled, job.steps, job.steps, scale, title, recorded=True)
            run.save_weights(compiled, folder / "model.safetensors")
            outcome.timeline.save(folder / "measured.npz")
            even_outcome = None
            if even is not None:
                even_outcome = run.train(
                    even, min(job.compare_even_steps, job.steps), job.steps, scale, "even"
                )
        finally:
            run.clean()
    summary = _summary(outcome, compiled, scale, unigram, job.steps)
    summary["start_seconds"] = sum(run.start[f"{part}_seconds"] for part in _START)
    summary["start"] = run.start
    summary["history_problems"] = _history_problems(folder / HISTORY, job.steps)
    summary["even_split_tokens_per_second"] = None
    _write_metrics(folder / "metrics.jsonl", outcome)
    even_summary = differ = None
    if even is not None and even_outcome is not None:
        even_summary = _summary(even_outcome, even, scale, None, len(even_outcome.losses))
        summary["even_split_tokens_per_second"] = even_summary["tokens_per_second"]
        differ = max(abs(a - b) / abs(a) for a, b in zip(outcome.losses, even_outcome.losses, strict=False))
        summary["even_losses_differ"] = differ
        save_plan(even.plan, folder / "even-plan.yaml")
        write_json(folder / "even.json", even_summary)
    _draw(folder, compiled, outcome)
    write_json(folder / "summary.json", summary)
    return Finished(folder, summary, even_summary, differ)


def _history_problems(folder: Path, steps: int) -> list[str]:
    entries, problems = read_history(folder)
    return problems + check_history(entries, steps)


def _scale_words(emulated: bool, scale: float) -> str:
    return (
        f"; emulated devices, time_scale {scale:.3g} (wall seconds per modelled second)" if emulated else ""
    )


def _refuse_vocabulary(job: Job, tokens: TokenFile) -> None:
    if tokens.vocab_size > job.workload.model.vocab_size:
        raise InputError(
            f"{job.path}: the tokenizer has {tokens.vocab_size} tokens, the model's vocab_size is "
            f"{job.workload.model.vocab_size}. Use a model or a tokenizer that match."
        )


def _write_metrics(path: Path, outcome: RunOutcome) -> None:
    """One line of JSON per step: step, loss, gradient norm, and the held-out loss where it was measured after it."""
    held_out = {step - 1: loss for step, loss in outcome.held_out}
    lines = [
        json.dumps(
            {
                "step": i,
                "loss": loss,
                "grad_norm": norm,
                **({"heldout_loss": held_out[i]} if i in held_out else {}),
            }
        )
        for i, (loss, norm) in enumerate(zip(outcome.losses, outcome.norms, strict=True))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _draw(folder: Path, compiled: _Compiled, outcome: RunOutcome) -> None:
    """timeline.html and trace.json of the step whose time is the median."""
    seconds = step_seconds(outcome.timeline)
    typical = int(np.argmin(np.abs(seconds - outcome.step_seconds)))
    write_chrome_trace(folder / "trace.json", [compiled.predicted, outcome.timeline], [typical])
    write_gantt(
        folder / "timeline.html", compiled.predicted, outcome.timeline, typical, compiled.plan.cluster.name
    )
