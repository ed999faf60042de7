"""A worker that dies or raises, and Ctrl-C: the job ends, says who, where and why, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.launch.small_job import Result, edit, fix_plan, launched, write_job
from tests.telemetry.prometheus import until

END_SECONDS = 10.0  # after a fault, everywhere
SLACK_SECONDS = 20.0  # for a machine that others use at the same time


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job that goes on until it is stopped."""
    write_job(tmp_path)
    fix_plan(tmp_path)
    edit(tmp_path / "job.yaml", ("steps: 3", "steps: 100000"), ("every: 3", "every: 100000"))
    return tmp_path


def test_a_killed_worker_ends_the_job_naming_rank_device_and_action(folder: Path) -> None:
    with launched(folder) as launch:
        launch.training()
        os.kill(launch.worker("b/0/0"), signal.SIGKILL)
        result = launch.end()
        assert launch.left() == []
    assert result.exit_code == 1
    last = result.err.splitlines()[-1]
    assert re.match(
        r"hethub: rank 1, device b/0/0 \(slow\), step \d+, .+: the worker process died\.", last
    ), last
    assert "Traceback" not in result.err
    assert not (folder / "run" / "summary.json").exists()


def test_a_worker_that_raises_ends_the_job_with_its_reason(folder: Path) -> None:
    edit(folder / "job.yaml", ("learning_rate: 3e-3", "learning_rate: 1e30"))
    with launched(folder) as launch:
        result = launch.end()
        assert launch.left() == []
    assert result.exit_code == 1
    last = result.err.splitlines()[-1]
    found = re.match(
        r"hethub: rank (\d), device \S+ \((fast|slow)\), update.*: the gradient norm is (nan|inf)", last
    )
    assert found, last
    assert "Traceback" not in result.err
    log = Path(last.split("Its log: ")[1])
    assert "NotFiniteError" in log.read_text()


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "stopped by SIGTERM")],
)
def test_a_signal_ends_the_job_and_all_its_processes(folder: Path, number: int, code: int, word: str) -> None:
    with launched(folder) as launch:
        launch.training()
        # A terminal sends Ctrl-C to the whole group, a scheduler SIGTERM to the launcher alone.
        if number == signal.SIGINT:
            os.killpg(launch.process.pid, number)
        else:
            launch.process.send_signal(number)
        result = launch.end()
        assert launch.left() == []
    assert result.exit_code == code, result.err
    assert result.err.splitlines()[-1] == f"hethub: {word}"
    assert "Traceback" not in result.err


def test_sigterm_ends_a_job_without_checkpoints_outside_training_too(folder: Path) -> None:
    """In a join that never ends. Seeded bug: only who trains looks at the signal, and the run ends with 1, of the
    join."""
    edit(folder / "job.yaml", ("output: run", "output: run\nfault: {device: b/0/0, action: join, do: hang}"))
    with launched(folder) as launch:
        until((folder / "run" / "logs" / "b-0-0.log").exists, END_SECONDS + SLACK_SECONDS, "a worker's log")
        launch.process.send_signal(signal.SIGTERM)
        result = launch.end()
        assert launch.left() == []
    assert result.exit_code == 75, result.err
    assert result.err.splitlines()[-1] == "hethub: stopped by SIGTERM"
    assert "Traceback" not in result.err


def ended_by(folder: Path, fault: str) -> Result:
    """Launch with a fault in step 1; the job has ended everywhere in time after it."""
    edit(folder / "job.yaml", ("output: run", f"output: run\nfault: {{{fault}}}"))
    with launched(folder) as launch:
        result = launch.end()
        ended = time.time()
        assert launch.left() == []
    for history in (folder / "run" / "history").glob("*.jsonl"):  # last written at the end of step 0
        assert ended - history.stat().st_mtime < END_SECONDS + SLACK_SECONDS
    assert result.exit_code == 1, result.err
    assert "Traceback" not in result.err
    return result


FORWARD = "step: 1, action: forward stage 1 micro-batch 0"


@pytest.mark.parametrize("phase", ["before", "during"])
@pytest.mark.parametrize("do", ["stop", "hang"])
def test_a_worker_that_stands_still_is_named_and_not_the_one_that_waits(
    folder: Path, do: str, phase: str
) -> None:
    result = ended_by(folder, f"device: b/0/0, {FORWARD}, phase: {phase}, do: {do}")
    last = result.err.splitlines()[-1]
    found = re.match(
        r"hethub: rank 1, device b/0/0 \(slow\), step 1, forward stage 1 micro-batch 0: no progress for "
        r"([\d.]+) s where ([\d.e-]+) s are predicted \(waiting: a/0/0\); the process (\w+)",
        last,
    )
    assert found, last
    assert float(found[1]) >= 5 > float(found[2])
    assert found[3] == ("is" if do == "stop" else "answers")
    told = {name: (folder / "run" / "logs" / f"{name}.log").read_text() for name in ("a-0-0", "b-0-0")}
    stands = "communicator.py" in told["a-0-0"], "faults.py" in told["b-0-0"]
    assert stands == (True, do == "hang"), told  # a stopped process writes nothing


@pytest.mark.parametrize(
    "action",
    ["send stage 1 micro-batch 0 activation to rank 1", "receive stage 0 micro-batch 0 gradient from rank 1"],
)
def test_a_peer_that_disappears_in_a_transfer_is_named(folder: Path, action: str) -> None:
    """The activation of a boundary; its receiver only loses a connection, which is no cause."""
    result = ended_by(folder, f"device: a/0/0, step: 1, action: {action}, phase: during, do: kill")
    last = result.err.splitlines()[-1]
    assert re.match(
        rf"hethub: rank 0, device a/0/0 \(fast\), step 1, {action}: the worker process died", last
    ), last


@pytest.mark.parametrize("emulated", [True, False])
def test_a_device_out_of_memory_tells_need_prediction_limit_and_what_to_change(
    folder: Path, emulated: bool
) -> None:
    """An emulated device by its tally, another by what its allocator says."""
    if not emulated:
        edit(folder / "cluster.yaml", ("emulated: {time_scale: 20}\n", ""))
    result = ended_by(folder, f"device: b/0/0, {FORWARD}, do: oom")
    last = result.err.splitlines()[-1]
    figures = (
        r"0\.\d\d MiB live, 0\.\d\d MiB predicted peak, b/0/0 \(slow, emulated\) has 0\.25 MiB\. "
        r"Lower micro_batch_rows or in_flight of stage 1, or set recompute: full\. "
        if emulated
        else r".* you tried to allocate \d+ bytes.*; the plan predicts a peak of 0\.\d\d MiB of 0\.25\. "
        r"Lower micro_batch_rows or in_flight here, set recompute: full, or plan with more memory_reserve\. "
    )
    action = r"hethub: rank 1, device b/0/0 \(slow\), forward stage 1 micro-batch 0: out of memory: "
    assert re.match(action + figures, last), last


@pytest.mark.parametrize("do", ["hang", "stop"])
def test_a_worker_that_never_joins_is_named(folder: Path, do: str) -> None:
    last = ended_by(folder, f"device: b/0/0, action: join, do: {do}").err.splitlines()[-1]
    assert re.match(
        r"hethub: rank 1, device b/0/0 \(slow\), join: did not join the other 1 workers within 8\.2 s\.", last
    ), last


def test_a_worker_that_dies_joining_is_named(folder: Path) -> None:
    last = ended_by(folder, "device: b/0/0, action: join, do: kill").err.splitlines()[-1]
    assert re.match(r"hethub: rank 1, device b/0/0 \(slow\), .*: the worker process died", last), last


def test_a_fault_at_an_action_that_is_not_there_is_refused_before_anything_starts(folder: Path) -> None:
    edit(
        folder / "job.yaml",
        (
            "output: run",
            "output: run\nfault: {device: b/0/0, action: forward stage 7 micro-batch 0, do: kill}",
        ),
    )
    with launched(folder) as launch:
        result = launch.end()
    assert result.exit_code == 2
    assert (
        'job.yaml:9:24 fault.action: the device has no action "forward stage 7 micro-batch 0"' in result.err
    )
    assert not (folder / "run").exists()
