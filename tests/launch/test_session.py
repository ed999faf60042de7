"""Where the training is cut for evaluations, and what is left of an attempt that another plan replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from hethub.checkpoints.manifest import TrainingSpec
from hethub.data.token_file import token_file_for
from hethub.data.tokenizers import load_tokenizer
from hethub.launch import step_watch
from hethub.launch.attempts import Attempts
from hethub.launch.compiled import compile_plan
from hethub.launch.crew import Crew
from hethub.launch.journal import Journal
from hethub.launch.lease import Lease
from hethub.launch.session import Session, _segments
from hethub.launch.step_watch import StepWatch
from hethub.launch.telemetry import Telemetry
from hethub.specs.job import load_job
from hethub.specs.plan import load_plan
from tests.chaos.three_types import write_job


@pytest.mark.parametrize(
    ("first", "steps", "every", "expected"),
    [
        (0, 6, 0, [(0, 6)]),
        (0, 6, 3, [(0, 3), (3, 6)]),
        (0, 7, 3, [(0, 3), (3, 6), (6, 7)]),
        (4, 7, 3, [(4, 6), (6, 7)]),  # a run that goes on evaluates after the same steps
        (6, 7, 3, [(6, 7)]),
        (5, 5, 3, []),
    ],
)
def test_a_run_is_evaluated_after_the_same_steps_wherever_it_begins(first, steps, every, expected) -> None:
    assert _segments(first, steps, every) == expected


def test_steps_of_a_replaced_plan_are_not_written_beside_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded bug: where the next attempt fails before it trains, the last steps of the one before are."""
    monkeypatch.setattr(step_watch, "_MOST_RECORDS", 0)  # they wait for the end
    write_job(tmp_path)
    job = load_job(tmp_path / "job.yaml")
    run = job.output
    run.mkdir()
    compiled = compile_plan(load_plan(tmp_path / "plan.yaml")[0])
    used = compiled.program.layout.used
    session = Session(
        job,
        Crew(job.cluster, used, run / "logs", None),
        run,
        token_file_for(job.data_files, load_tokenizer(job.tokenizer), run),
        Lease(run),
        Telemetry(job, run, print),
        print,
    )
    session.steps = StepWatch(compiled, 1.0, run, print, links=True)
    records = compiled.predicted.records
    session.steps.look(
        4, lambda devices: {device: records[records["device"] == device] for device in devices}
    )
    attempts = Attempts(
        job=job,
        folder=run,
        compiled=compiled,
        training=TrainingSpec.model_construct(),
        session=session,
        journal=Journal(run),
        number=1,
        goes_on=False,
        say=print,
    )
    attempts._replan({"b/0/0"})
    session.clean()
    assert attempts.compiled is not compiled
    assert not (run / "measured.npz").exists()
