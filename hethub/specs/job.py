"""The job file: which cluster, plan, data, how many steps, where to."""

from __future__ import annotations

import glob
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from hethub.specs.base import Problems, Spec, validate_document
from hethub.specs.cluster import Cluster, lacking_precision, load_cluster_file
from hethub.specs.constraints import Constraints, Objective
from hethub.specs.document import Document, Key, load_document
from hethub.specs.nearest import unknown_name
from hethub.specs.workload import Workload, WorkloadSpec, resolve_workload

__all__ = [
    "COMPUTE",
    "JOIN",
    "CheckpointPolicy",
    "Deed",
    "FailurePolicy",
    "Fault",
    "Job",
    "JobSpec",
    "OptimizerSettings",
    "PhaseName",
    "load_job",
]

_STDLIB = "stdlib:"
JOIN = "join"  # the one action of a fault that comes before the first step: joining the job
COMPUTE = "compute"  # all compute actions of a device, of a fault that makes it slow for whole steps

PhaseName = Literal["before", "during", "after"]
Deed = Literal["kill", "raise", "exit", "hang", "stop", "slow", "oom", "nan"]


class DataSpec(Spec):
    """Text files or a token file, and how they are read."""

    files: list[str] = Field(
        min_length=1,
        description="Text files as globs relative to this file (stdlib:GLOB is relative to Python's own "
        "library), or one .tokens file.",
    )
    tokenizer: str = Field("bytes", description="bytes, or the path of a Hugging Face tokenizer.json.")
    held_out: float = Field(
        0.05, ge=0, le=0.5, description="Share of the tokens kept for evaluation, 0 to 0.5."
    )


class EvaluateSpec(Spec):
    """When and on how much held-out text to evaluate."""

    every: int = Field(ge=1, description="Steps between evaluations.")
    rows: int = Field(ge=1, description="Held-out sequences of each evaluation.")


class OptimizerSpec(Spec):
    """AdamW with warm-up, decay and clipping."""

    learning_rate: float = Field(gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(0.1, ge=0, description="Decay of weight matrices per unit of learning rate.")
    clip_norm: float | None = Field(
        1.0, gt=0, description="Largest global gradient norm; null does not clip."
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment.")
    epsilon: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")
    final_learning_rate_ratio: float = Field(
        0.1, ge=0, le=1, description="Learning rate of the last step over the peak; a cosine leads there."
    )


class CompareSpec(Spec):
    """A second run on the same workers."""

    even_steps: int = Field(ge=1, description="Steps of the best even split, after the run.")


class RaySpec(Spec):
    """The Ray cluster to join."""

    address: str | None = Field(None, description="Ray address; without one a local Ray is started.")


class HistorySpec(Spec):
    """How closely a run is recorded."""

    digest_every: int = Field(50, ge=1, description="Steps between digests of all weights.")


class CheckpointSpec(Spec):
    """When the whole state goes to disk."""

    every: int = Field(ge=1, description="Steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Newest checkpoints that stay.")
    notice_seconds: float = Field(
        30.0, ge=0, description="After SIGTERM, how long the run has to save and end; 0 ends at once."
    )


class FailureSpec(Spec):
    """What becomes of the run when a worker dies or stalls, or a gradient is no number."""

    restart: Literal["none", "same", "replan"] = Field(
        "none",
        description="none: the run ends. same: from the newest checkpoint on the same devices. replan: without the "
        "lost devices, split anew.",
    )
    max_restarts: int = Field(3, ge=0, description="Most restarts within `within_seconds`.")
    within_seconds: float = Field(3600.0, gt=0, description="The time in which restarts count.")
    not_a_number: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="A loss or gradient that is not finite. stop: the run ends before the update. skip: no update in "
        "this step. roll_back: from the newest checkpoint again.",
    )


class TelemetrySpec(Spec):
    """Metrics for Prometheus."""

    enabled: bool = Field(True, description="Whether metrics are counted and served.")
    listen: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to serve them on: this machine only, unless told otherwise. They are not encrypted and "
        "ask for no password.",
    )


class FaultSpec(Spec):
    """An interruption on purpose, to see what becomes of the run."""

    device: str | None = Field(None, description="The device it happens to, group/node/device.")
    link: str | None = Field(
        None,
        description="Instead of a device: the link that is slow (emulated ones only): the two names of `links` "
        "joined by a hyphen, `inter GROUP` between its nodes, or `intra GROUP` inside them.",
    )
    step: int = Field(0, ge=0, description="The training step, counted from 0.")
    steps: int = Field(
        1, ge=1, description="For a slow link or all of compute: how many steps, from `step` on."
    )
    action: int | str | None = Field(
        None,
        description="Where in the device's list: an action's number, its words as error messages print them "
        "(the first so called), join: when the worker joins the job, or compute: all compute of whole steps (slow "
        "only).",
    )
    phase: PhaseName = Field("before", description="before, during or after the action.")
    do: Deed = Field(
        description="kill: SIGKILL to the worker. raise: an exception. exit: the process ends. hang: never go on. "
        "stop: SIGSTOP to the worker. slow: take longer. oom: ask for more memory than there is. "
        "nan: a gradient becomes NaN."
    )
    factor: float = Field(
        2.0,
        gt=1,
        description="For slow: times the predicted seconds of the action; a link's bandwidth is divided by it.",
    )


class JobSpec(Spec):
    """The job file as written. Paths are relative to it."""

    cluster: str = Field(description="Path of the cluster file.")
    plan: str = Field("auto", description="auto, or the path of a plan file.")
    data: DataSpec = Field(description="What to train on.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    seed: int = Field(0, ge=0, description="Of initial weights and of the order of samples.")
    evaluate: EvaluateSpec | None = Field(None, description="Evaluation on held-out text.")
    optimizer: OptimizerSpec = Field(description="AdamW and its learning rate.")
    output: str = Field(description="Folder of the run, made by it.")
    compare: CompareSpec | None = Field(None, description="What to compare the run with.")
    ray: RaySpec = Field(RaySpec(), description="Where the workers run.")
    workload: WorkloadSpec | None = Field(None, description="Instead of the cluster file's workload.")
    history: HistorySpec = Field(HistorySpec(), description="The record of what every worker trained on.")
    checkpoint: CheckpointSpec | None = Field(None, description="Checkpoints; without it there are none.")
    on_failure: FailureSpec = Field(FailureSpec(), description="When to go on after a failure, and how.")
    telemetry: TelemetrySpec = Field(
        TelemetrySpec(), description="Metrics: whether, and where to serve them."
    )
    initial_weights: str | None = Field(
        None, description="Folder of a Hugging Face Llama (config.json, *.safetensors) to begin with."
    )
    fault: FaultSpec | list[FaultSpec] = Field(
        default=[], description="Interruptions on purpose, one or a list; none in a run that matters."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """AdamW (Loshchilov and Hutter, 2019) with warm-up, cosine decay to `final_learning_rate_ratio` of the
    peak, and clipping of the global gradient norm (None: no clipping)."""

    learning_rate: float
    warmup_steps: int
    weight_decay: float
    clip_norm: float | None
    beta1: float
    beta2: float
    epsilon: float
    final_learning_rate_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPolicy:
    """Save after every `every` steps, keep the newest `keep`; SIGTERM leaves `notice_seconds` to save and end."""

    every: int
    keep: int
    notice_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """When a failed run goes on, and how; the fields are the job file's `on_failure`."""

    restart: Literal["none", "same", "replan"]
    max_restarts: int
    within_seconds: float
    not_a_number: Literal["stop", "skip", "roll_back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """An interruption on purpose.

    `device` indexes `Cluster.devices()`, -1 where a `link` is slow; `action` is a number in that device's list, words,
    JOIN, or COMPUTE, which a slow link has too: these last `steps` steps. Only a program can tell whether there is such
    an action, so `place` (`file:line:column key` of the action) is kept for the message.
    """

    device: int
    link: str = ""
    steps: int = 1
    step: int
    action: int | str
    phase: PhaseName
    do: Deed
    factor: float
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training job with its files found; paths are absolute.

    `plan` is None when it is to be searched, within the cluster file's `constraints` and by its `objective`;
    `tokenizer` is "bytes" or the path of a tokenizer.json; `evaluate_every` and `evaluate_rows` are 0 without
    evaluation, `compare_even_steps` is 0 without a comparison, `telemetry_listen` is None without metrics.
    """

    path: Path
    cluster_path: Path
    cluster: Cluster
    constraints: Constraints
    objective: Objective
    workload: Workload
    plan: Path | None
    data_files: tuple[Path, ...]
    tokenizer: str | Path
    held_out: float
    steps: int
    seed: int
    evaluate_every: int
    evaluate_rows: int
    optimizer: OptimizerSettings
    output: Path
    compare_even_steps: int
    ray_address: str | None
    digest_every: int
    faults: tuple[Fault, ...]
    checkpoint: CheckpointPolicy | None
    on_failure: FailurePolicy
    initial_weights: Path | None
    telemetry_listen: str | None


def load_job(path: Path, *, cluster_file: Path | None = None, plan_file: Path | None = None) -> Job:
    """Read a job file, and the cluster file that it names. Raises InputError with one line per problem.

    `cluster_file` and `plan_file` stand in for the job's own; with another cluster and no plan the plan is searched.
    """
    document = load_document(path)
    spec = validate_document(document, JobSpec)
    problems = Problems(document)
    cluster_path = cluster_file or _file(spec.cluster, document, problems, "cluster")
    plan = plan_file
    if plan is None and cluster_file is None and spec.plan != "auto":
        plan = _file(spec.plan, document, problems, "plan")
    tokenizer: str | Path = "bytes"
    if spec.data.tokenizer != "bytes":
        tokenizer = _file(spec.data.tokenizer, document, problems, "data", "tokenizer")
    data_files = _data_files(spec.data.files, document, problems)
    _check_evaluation(spec, problems)
    _check_recovery(spec, problems)
    initial = None if spec.initial_weights is None else _absolute(document, spec.initial_weights)
    if initial is not None and not os.path.isdir(initial):
        problems.add(
            ("initial_weights",), f"there is no folder {initial}. Mend the path, relative to this file."
        )
    problems.raise_any()
    told = load_cluster_file(cluster_path)
    cluster, default = told.cluster, told.workload
    evaluate = spec.evaluate
    return Job(
        path=_absolute(document, path.name),
        cluster_path=cluster_path,
        cluster=cluster,
        constraints=told.constraints,
        objective=told.objective,
        workload=_workload(spec, document, cluster, default),
        plan=plan,
        data_files=data_files,
        tokenizer=tokenizer,
        held_out=float(spec.data.held_out),
        steps=spec.steps,
        seed=spec.seed,
        evaluate_every=0 if evaluate is None else evaluate.every,
        evaluate_rows=0 if evaluate is None else evaluate.rows,
        optimizer=OptimizerSettings(**spec.optimizer.model_dump()),
        output=_absolute(document, spec.output),
        compare_even_steps=0 if spec.compare is None else spec.compare.even_steps,
        ray_address=spec.ray.address,
        digest_every=spec.history.digest_every,
        faults=_faults(spec, document, cluster),
        checkpoint=None if spec.checkpoint is None else CheckpointPolicy(**spec.checkpoint.model_dump()),
        on_failure=FailurePolicy(**spec.on_failure.model_dump()),
        initial_weights=initial,
        telemetry_listen=spec.telemetry.listen if spec.telemetry.enabled else None,
    )


def _absolute(document: Document, name: str) -> Path:
    """A path that the file names, relative to the file; symbolic links stay."""
    return Path(os.path.abspath(document.path.parent / name))


def _file(name: str, document: Document, problems: Problems, *keys: str) -> Path:
    path = _absolute(document, name)
    if not os.path.isfile(path):  # of a name that cannot be one, too
        problems.add(keys, f"there is no file {path}. Mend the path, which is relative to this file.")
    return path


def _data_files(patterns: list[str], document: Document, problems: Problems) -> tuple[Path, ...]:
    """The files of all globs: in the order of the entries, each entry's sorted, none twice."""
    found: dict[Path, int] = {}
    for number, pattern in enumerate(patterns):
        if pattern.startswith(_STDLIB):
            folder, pattern = Path(sysconfig.get_path("stdlib")), pattern.removeprefix(_STDLIB)
        else:
            folder = document.path.parent
        # The folder's own name may hold characters that a glob would read.
        matches = sorted(
            glob.glob(os.path.join(glob.escape(os.path.abspath(folder)), pattern), recursive=True)
        )
        files = [Path(os.path.abspath(match)) for match in matches if os.path.isfile(match)]
        if not files:
            problems.add(
                ("data", "files", number), f"no file matches {folder / pattern}. Mend the path or the glob."
            )
        for file in files:
            found.setdefault(file, number)
    tokens = next((file for file in found if file.suffix == ".tokens"), None)
    if tokens is not None and len(found) > 1:
        problems.add(("data", "files", found[tokens]), f"{tokens.name} is a token file. Give it alone.")
    return tuple(found)


def _check_evaluation(spec: JobSpec, problems: Problems) -> None:
    if spec.evaluate is not None and spec.data.held_out == 0:
        problems.add(
            ("evaluate",), "there is no held-out text, as data.held_out is 0. Give some, or drop this key."
        )


def _check_recovery(spec: JobSpec, problems: Problems) -> None:
    """Going on needs something to go on from."""
    policy = spec.on_failure
    if spec.checkpoint is None and policy.not_a_number == "roll_back":
        problems.add(
            ("on_failure", "not_a_number"), "roll_back needs checkpoints. Add `checkpoint`, or skip."
        )


def _faults(spec: JobSpec, document: Document, cluster: Cluster) -> tuple[Fault, ...]:
    """The job's faults on named devices of the cluster."""
    problems = Problems(document)
    names = {device.name: index for index, device in enumerate(cluster.devices())}
    several = isinstance(spec.fault, list)
    found = []
    for number, entry in enumerate(spec.fault if isinstance(spec.fault, list) else [spec.fault]):
        keys: tuple[Key, ...] = ("fault", number) if several else ("fault",)
        if entry.link is None:
            _check_fault(entry, keys, spec, names, problems)
        else:
            _check_slow_link(entry, keys, cluster, problems)
        if entry.step >= spec.steps:
            problems.add(
                (*keys, "step"),
                f"{entry.step} is past the last step of the job, {spec.steps - 1}. Name an earlier one.",
            )
        place = document.line((*keys, "device" if entry.action is None else "action"), "").removesuffix(": ")
        found.append(
            Fault(
                device=names.get(entry.device or "", -1),
                link=entry.link or "",
                action=COMPUTE if entry.action is None else entry.action,
                place=place,
                **entry.model_dump(include={"step", "steps", "phase", "do", "factor"}),
            )
        )
    problems.raise_any()
    return tuple(found)


def _check_fault(
    entry: FaultSpec, keys: tuple[Key, ...], spec: JobSpec, names: dict[str, int], problems: Problems
) -> None:
    if entry.device is None or entry.action is None:
        missing = "device" if entry.device is None else "action"
        problems.add((*keys, missing), "is missing. A fault names a device and an action, or a slow link.")
        return
    if entry.device not in names:
        problems.add(
            (*keys, "device"), unknown_name(f'there is no device "{entry.device}"', entry.device, names)
        )
    if entry.action == COMPUTE and entry.do != "slow":
        problems.add((*keys, "action"), f"compute is for do: slow. Name the action to {entry.do} at.")
    if entry.action != COMPUTE and entry.steps > 1:
        problems.add((*keys, "steps"), "is for action: compute and for links. An action comes in one step.")
    if entry.action == JOIN and (entry.step, entry.phase) != (0, "before"):
        problems.add((*keys, "action"), "join comes once, before step 0. Leave out step and phase.")
    if entry.action == JOIN and entry.do in ("slow", "oom", "nan"):
        problems.add((*keys, "do"), f"a worker that joins has nothing to {entry.do} yet. Name an action.")


def _check_slow_link(entry: FaultSpec, keys: tuple[Key, ...], cluster: Cluster, problems: Problems) -> None:
    names = cluster.named_links()
    if entry.device is not None or entry.action is not None or entry.do != "slow":
        problems.add(
            (*keys, "link"), "a link can only be slow. Leave out device and action, and set do: slow."
        )
    if entry.link not in names:
        problems.add(
            (*keys, "link"), unknown_name(f'there is no link "{entry.link}"', entry.link or "", names)
        )
    if cluster.emulated_time_scale is None:
        problems.add(
            (*keys, "link"), "real links are as fast as they are. Emulate the cluster, or drop this."
        )


def _workload(spec: JobSpec, document: Document, cluster: Cluster, default: Workload | None) -> Workload:
    if spec.workload is None:
        if default is None:
            raise document.error(
                ("cluster",), "the cluster file has no workload. Add `workload` there or here."
            )
        return default
    workload = resolve_workload(spec.workload, document, ("workload",))
    problems = Problems(document)
    for text in lacking_precision(cluster, workload.precision).values():
        problems.add(("workload", "precision"), text)
    problems.raise_any()
    return workload
