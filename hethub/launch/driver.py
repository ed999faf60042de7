"""The driver: from a job to a finished run folder. Planner and simulator decide; only the driver acts."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hethub import __version__
from hethub.checkpoints.manifest import TrainingSpec
from hethub.checkpoints.store import CHECKPOINTS, Store
from hethub.data.batches import Batches
from hethub.data.token_file import TokenFile, open_token_file, token_file_for
from hethub.data.tokenizers import load_tokenizer
from hethub.data.unigram import unigram_loss
from hethub.errors import HeadLostError, HetHubError, InputError, RunError
from hethub.files import write_json
from hethub.interruption import patient, terminated
from hethub.launch.attempts import Attempts, next_attempt
from hethub.launch.compiled import Compiled, choose_plans, compile_plan, read_plan
from hethub.launch.crew import Crew
from hethub.launch.environment import environment
from hethub.launch.history import HISTORY, read_history
from hethub.launch.history_check import check_history, check_journal, committed_steps
from hethub.launch.journal import Event, Journal, read_journal
from hethub.launch.outcome import RunOutcome, draw, summary_of, write_metrics
from hethub.launch.run_folder import RunFolder
from hethub.launch.session import Session
from hethub.launch.telemetry import Telemetry
from hethub.program.faults import plan_faults
from hethub.simulate.comparison import MEASURED
from hethub.specs.job import Job
from hethub.specs.llama_config import config_of
from hethub.specs.plan import save_plan

__all__ = ["Finished", "launch"]

# Parts of a start, in order. `plan` is all before the workers: tokens, plan, program, prediction. `rehearsal` is there
# for `time_scale: auto` alone, so it is no part of `start_seconds`, as the first step itself is none.
_START = ("plan", "ray", "import", "join", "load")


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


@dataclass(frozen=True, slots=True)
class Finished:
    """What a launch hands to the command line: the summaries as written, the even one's None without a comparison."""

    folder: Path
    summary: dict[str, Any]
    even: dict[str, Any] | None
    losses_differ: float | None  # largest relative difference between the two runs' losses, step by step


@dataclass(frozen=True)
class _Prepared:
    """All that is known before the first worker starts."""

    job: Job
    folder: RunFolder
    compiled: Compiled
    even: Compiled | None
    tokens: TokenFile
    batches: Batches
    training: TrainingSpec
    resume: bool
    begin: float


def launch(
    job: Job,
    say: Callable[[str], None],
    *,
    resume: bool = False,
    opened: Sequence[Callable[[Path], None]] = (),
) -> Finished:
    """Run a job to its end: plan, train, evaluate, save. `say` takes lines for a person.

    Everything is checked before the first file is written. The run folder then holds plan.yaml, logs, predicted.npz and
    measured.npz, trace.json, timeline.html, model.safetensors and last of all summary.json. With `resume` the folder is
    one of an unfinished run of the job, which goes on from its newest intact checkpoint. All of `opened` are called
    with the folder once it is ours. Raises InputError, InfeasibleError, MachineError, or RunError when a worker fails
    and the job's policy does not go on; ends with KeyboardInterrupt after a signal. Why it ended stands in the journal.
    """
    begin = time.monotonic()
    _refuse_precision(job)
    folder = RunFolder(job.output)
    with _opened(job, folder, begin, resume=resume) as prepared, _end_noted(folder.path):
        for tell in opened:
            tell(folder.path)
        return _run(prepared, say)


@contextlib.contextmanager
def _end_noted(folder: Path) -> Iterator[None]:
    """Write into the journal why a run ended before its end, unless that stands there."""
    try:
        yield
    except KeyboardInterrupt:
        events, _ = read_journal(folder)
        if not events or events[-1].event != "stopped":
            Journal(folder).add(Event(event="stopped", **_where(events)))
        raise
    except Exception as error:
        events, _ = read_journal(folder)
        told = error.message if isinstance(error, HetHubError) else f"{type(error).__name__}: {error}"
        Journal(folder).add(
            Event(
                event="gave_up",
                **_where(events),
                reason=" ".join(told.split()),
                exit_code=_exit_code(error),
            )
        )
        raise


def _exit_code(error: Exception) -> int:
    """What the command ends with; of a lost head the driver tells its launcher by a code that nobody else sees."""
    if isinstance(error, HetHubError) and not isinstance(error, HeadLostError):
        return error.exit_code
    return RunError.exit_code


def _where(events: list[Event]) -> dict[str, Any]:
    """Attempt and step of the newest event."""
    return {"attempt": events[-1].attempt, "step": events[-1].step} if events else {"attempt": 1, "step": 0}


@contextlib.contextmanager
def _opened(job: Job, folder: RunFolder, begin: float, *, resume: bool) -> Iterator[_Prepared]:
    """Check everything, then take the run folder for as long as the run lasts."""
    folder.check_resumable() if resume else folder.check()
    if not resume:
        _refuse_inputs_inside(job)
    with contextlib.ExitStack() as held:
        with tempfile.TemporaryDirectory(prefix="hethub-data-") as scratch:
            tokens, batches = _tokens(job, Path(scratch))
            plan, even_plan = _plans(job) if resume else choose_plans(job)
            compiled = compile_plan(plan)
            even = (
                None
                if even_plan is None
                else compile_plan(even_plan.model_copy(update={"bounds": plan.bounds}))
            )
            # Faults that the plan has no place for are told before anything is written.
            plan_faults(job.faults, compiled.program, compiled.seconds)
            training = _training(job, tokens)
            if resume:
                _require_same_training(job, training)
            held.callback(folder.close)  # whatever fails from here on
            folder.reopen() if resume else folder.open(_mark(job))
            with _end_noted(folder.path):
                tokens = _moved(tokens, Path(scratch), folder.path)
        yield _Prepared(job, folder, compiled, even, tokens, batches, training, resume, begin)


def _mark(job: Job) -> dict[str, Any]:
    """What run.json says: by it others know the run before anything else is written."""
    return {
        "hethub": __version__,
        "job": job.path.name,
        "job_file": str(job.path),
        "started_unix_seconds": time.time(),
        "cluster": job.cluster.name,
        "emulated": job.cluster.emulated_time_scale is not None,
        "steps": job.steps,
        "environment": environment(),
    }


def _plans(job: Job) -> tuple[Any, None]:
    """The plan that the run had, if it is still one for the job's cluster; else one searched for that."""
    if job.plan is None:
        with contextlib.suppress(InputError):
            return read_plan(job.output / "plan.yaml", job), None
    return choose_plans(replace(job, compare_even_steps=0))[0], None


def _training(job: Job, tokens: TokenFile) -> TrainingSpec:
    """What must be equal for a checkpoint to be of this job."""
    initial = ""
    if job.initial_weights is not None:
        from hethub.launch.pretrained import check_pretrained

        initial = check_pretrained(job.initial_weights, job.workload.model)
    return TrainingSpec(
        seed=job.seed,
        steps=job.steps,
        sequence_length=job.workload.sequence_length,
        global_batch=job.workload.global_batch,
        precision=job.workload.precision,
        held_out=job.held_out,
        tokens=tokens.digest,
        optimizer=asdict(job.optimizer),
        model={key: value for key, value in config_of(job.workload.model).items() if key != "name"},
        initial_weights=initial,
    )


def _require_same_training(job: Job, training: TrainingSpec) -> None:
    """Refuse to go on with another training than that of the run's checkpoints."""
    for one in Store(job.output / CHECKPOINTS).listed():
        different = [] if one.manifest is None else one.manifest.training.differences(training)
        if different:
            raise InputError(
                f"{job.path}: the checkpoints of {job.output} are of another training: {', '.join(different)}. "
                "Give the job that wrote them, or launch it into another folder."
            )


def _run(run: _Prepared, say: Callable[[str], None]) -> Finished:
    job, folder, compiled = run.job, run.folder.path, run.compiled
    unigram = unigram_loss(run.batches, job.evaluate_rows) if job.evaluate_rows else None
    compiled.save(folder)
    plans = [compiled] if run.even is None else [compiled, run.even]
    devices = sorted({device for c in plans for device in c.program.layout.used})
    say(f"{len(devices)} workers start; logs in {folder / 'logs'}")
    planned = time.monotonic()
    with (
        _importing_ahead(),
        Telemetry(job, folder, say) as telemetry,
        Crew(job.cluster, devices, folder / "logs", job.ray_address) as crew,
    ):
        if job.telemetry_listen is not None:
            crew.serve(telemetry.folder, job.telemetry_listen)
        session = Session(job, crew, folder, run.tokens, run.folder.lease, telemetry, say)
        session.start |= {"plan_seconds": planned - run.begin, "ray_seconds": time.monotonic() - planned}

        def ready(session: Session) -> float:
            begin = time.monotonic()
            scale = session.time_scale(plans)
            session.start["rehearsal_seconds"] = time.monotonic() - begin
            say(
                f"workers ready after {time.monotonic() - planned:.1f} s"
                + _scale_words(session.emulated, scale)
            )
            return scale

        attempts = Attempts(
            job=job,
            folder=folder,
            compiled=compiled,
            training=run.training,
            session=session,
            journal=Journal(folder),
            number=next_attempt(folder),
            goes_on=run.resume,
            say=say,
        )
        try:
            outcome = attempts.train(ready, "uneven" if run.even else "train")
            outcome.timeline.save(folder / f"{MEASURED}.npz")
            if outcome.stopped:
                raise KeyboardInterrupt
            with patient(session.notice_seconds):
                session.save_weights(attempts.compiled, folder / "model.safetensors")
            even_outcome = None
            if run.even is not None and attempts.compiled is compiled and not terminated():
                assert attempts.scale is not None
                even_outcome = _compared(session, run.even, attempts.scale, say)
        finally:
            session.clean()
    return _finish(run, attempts, outcome, even_outcome, unigram)


def _compared(
    session: Session, even: Compiled, scale: float, say: Callable[[str], None]
) -> RunOutcome | None:
    """The even split's run; None where it fails, which takes nothing from the training that has come to its end."""
    try:
        return session.train(even, min(session.job.compare_even_steps, session.job.steps), scale, "even")
    except RunError as error:
        if not session.lease.held():  # the folder is another driver's now
            raise
        say(f"warning: no comparison with the even split: {error.message}")
        return None


def _finish(
    run: _Prepared, attempts: Attempts, outcome: RunOutcome, even: RunOutcome | None, unigram: float | None
) -> Finished:
    """Figures, pictures, and last of all the summary."""
    job, folder, compiled, scale = run.job, run.folder.path, attempts.compiled, attempts.scale
    assert scale is not None
    outcome, problems = _whole_run(folder, job.steps, outcome)
    summary = summary_of(outcome, compiled, scale, unigram)
    start = attempts.session.start
    summary["start_seconds"] = sum(start[f"{part}_seconds"] for part in _START)
    summary["start"] = start
    summary["history_problems"] = problems
    summary |= _recovery_figures(attempts)
    summary["even_split_tokens_per_second"] = None
    write_metrics(folder / "metrics.jsonl", outcome)
    even_summary = differ = None
    if run.even is not None and even is not None:
        even_summary = summary_of(even, run.even, scale, None)
        summary["even_split_tokens_per_second"] = even_summary["tokens_per_second"]
        differ = max(
            (
                abs(a - b) / abs(a)
                for a, b in zip(outcome.losses, even.losses, strict=False)
                if math.isfinite(a) and math.isfinite(b)
            ),
            default=None,
        )
        summary["even_losses_differ"] = differ
        save_plan(run.even.plan, folder / "even-plan.yaml")
        write_json(folder / "even.json", even_summary)
    draw(folder, compiled, outcome)
    write_json(folder / "summary.json", summary)
    return Finished(folder, summary, even_summary, differ)


def _whole_run(folder: Path, steps: int, outcome: RunOutcome) -> tuple[RunOutcome, list[str]]:
    """The outcome with the losses of all attempts, as the histories have them, and what is wrong with these."""
    entries, problems = read_history(folder / HISTORY)
    events, torn = read_journal(folder)
    problems += torn + check_history(entries, steps) + check_journal(entries, events, steps)
    by_step = [found[0] for _, found in sorted(committed_steps(entries).items())]
    held_out = {
        event.step: event.loss for event in events if event.event == "evaluated" and event.loss is not None
    }
    whole = replace(
        outcome,
        losses=tuple(float.fromhex(entry.loss) for entry in by_step),
        norms=tuple(float.fromhex(entry.norm) for entry in by_step),
        held_out=tuple(sorted(held_out.items())),
    )
    return whole, problems


def _recovery_figures(attempts: Attempts) -> dict[str, Any]:
    """How often the run began again, what each recovery took, and what checkpoints cost."""
    events, _ = read_journal(attempts.folder)
    counts = attempts.counts
    return {
        "restarts": sum(event.event == "failed" for event in events),
        "recoveries": [event.seconds for event in events if event.event == "recovered"],
        "checkpoints": {
            "made": counts.made,
            "failed": counts.failed,
            "longest_stall_seconds": max(counts.stall_seconds, default=None),
            "longest_seconds": max(counts.seconds, default=None),
            "saved_bytes_ratio": max(counts.saved_over_state, default=None),
        },
    }


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
