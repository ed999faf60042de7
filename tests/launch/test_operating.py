"""Runs as their operator sees them: detached, watched, stopped, gone on with, killed. Real launches on a real Ray."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.small_job import Result, edit, left_behind, marked, wait_for_end, write_job
from tests.telemetry.prometheus import until

_WAIT_SECONDS = 90.0
STEPS = 400


class Operator:
    """Runs `hethub` in a folder of a job, as a person would; kills what is left at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = Path(tempfile.mkdtemp(prefix="hh-"))

    def do(self, *arguments: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "hethub", *arguments],
            cwd=self.folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            capture_output=True,
            text=True,
            timeout=_WAIT_SECONDS,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def status(self) -> dict[str, Any]:
        found = self.do("status", "run", "--json")
        assert found.exit_code == 0, found.err
        state: dict[str, Any] = json.loads(found.out)
        return state

    def until(self, key: str, least: int) -> dict[str, Any]:
        """The status once a figure of it has come so far."""
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end:
            state = self.status()
            if (state[key] or 0) >= least:
                return state
        raise AssertionError(f"{key} is {state[key]}, not {least}")

    def there(self, name: str) -> None:
        """Return once the run has a file."""
        until((self.folder / "run" / name).exists, _WAIT_SECONDS, name)

    def left(self) -> list[str]:
        """Processes of this operator's launches, once the launcher, the last to end, has done so."""
        for process in marked(self.temporary):
            wait_for_end(process)
        return left_behind(self.temporary)

    def close(self) -> None:
        for process in marked(self.temporary):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    write_job(tmp_path)
    edit(
        tmp_path / "job.yaml",
        ("steps: 3", f"steps: {STEPS}"),
        ("evaluate: {every: 3, rows: 16}", "checkpoint: {every: 5}"),
    )
    found = Operator(tmp_path)
    yield found
    found.close()


def test_a_detached_run_is_watched_stopped_with_a_checkpoint_and_lost_when_killed(operator: Operator) -> None:
    begun = operator.do("launch", "job.yaml", "--detach")
    assert begun.exit_code == 0, begun.err
    assert "workers ready" in begun.err and f"follow it\thethub logs {operator.folder / 'run'}" in begun.out
    state = operator.until("steps_done", 6)
    assert (state["state"], state["steps"], state["cluster"], state["emulated"]) == (
        "running",
        STEPS,
        "two-speeds",
        True,
    )
    # The launcher leads a session of its own, which gets no terminal's signals; the driver is in it.
    launcher = int(begun.out.split("process ")[1].split()[0])
    assert os.getsid(state["process"]) == launcher != os.getsid(0)
    listed = operator.do("runs", ".")
    assert "run\trunning\t" in listed.out
    said = operator.do("logs", "run")
    assert "driver: 2 workers start" in said.out and "a-0-0: device index 0" in said.out
    alone = operator.do("logs", "run", "--device", "b/0/0")
    assert alone.out.startswith("device index 1")
    wrong = operator.do("logs", "run", "--device", "c/0/0")
    assert wrong.exit_code == 2 and "b-0-0" in wrong.err

    stopped = operator.do("stop", "run")
    assert stopped.exit_code == 0, stopped.err
    assert "stopped with a checkpoint after step" in stopped.out
    state = operator.status()
    assert state["state"] == "stopped" and state["checkpoint_step"] == state["steps_done"]
    assert (operator.folder / "run" / "measured.npz").exists()
    assert operator.left() == []

    again = operator.do("launch", "--resume", "run", "--detach")
    assert again.exit_code == 0, again.err
    assert f"going on from step-{state['steps_done']:08d}" in again.err
    assert again.err.count("workers start") == 1  # what was written before is not shown again
    began_at = state["steps_done"]
    state = operator.until("steps_done", began_at + 1)
    operator.there("measured.npz")  # of the last steps, while it goes on
    told = operator.do("replan", "run", "--json")
    assert told.exit_code == 0, told.err
    calibrated = json.loads(told.out)
    assert calibrated["goes_on"] and calibrated["steps"][0] >= began_at
    os.kill(state["process"], signal.SIGKILL)
    wait_for_end(state["process"])
    lost = operator.status()
    assert lost["state"] == "lost" and f"process {state['process']}" in lost["why"]
    refused = operator.do("stop", "run")
    assert refused.exit_code == 0 and "it had ended" in refused.out and "state\tlost" in refused.out


def test_a_detached_run_whose_driver_is_killed_goes_on_and_its_log_says_so(operator: Operator) -> None:
    """Seen to catch: a second driver that looked for the launch's first log, which was gone. It ended, untold."""
    edit(operator.folder / "job.yaml", ("output: run", "output: run\non_failure: {restart: same}"))
    begun = operator.do("launch", "job.yaml", "--detach")
    assert begun.exit_code == 0, begun.err
    driver = operator.until("checkpoint_step", 5)["process"]
    os.kill(driver, signal.SIGKILL)
    state = operator.until("attempt", 2)
    assert state["state"] == "running" and state["process"] != driver
    said = operator.do("logs", "run", "--device", "driver").out
    assert f"hethub: the driver (process {driver}) was killed by SIGKILL." in said
    assert "going on with another driver" in said and "going on from step-" in said
    assert said.count("2 workers start") == 2
    stopped = operator.do("stop", "run")
    assert "stopped with a checkpoint after step" in stopped.out, stopped.err
    for process in marked(operator.temporary):
        wait_for_end(process)
    assert marked(operator.temporary) == []  # but for files of the killed driver's Ray nothing is left


@pytest.mark.parametrize("how", [(), ("--now",)])
def test_a_run_without_checkpoints_is_stopped_by_a_clean_end(
    operator: Operator, how: tuple[str, ...]
) -> None:
    """Seeded bug: the second signal of `--now` cuts the cleaning up off, and Ray's files stay."""
    edit(operator.folder / "job.yaml", ("checkpoint: {every: 5}\n", ""))
    assert operator.do("launch", "job.yaml", "--detach").exit_code == 0
    operator.there("measured.npz")
    stopped = operator.do("stop", "run", *how)
    assert "there is no checkpoint to go on from" in stopped.out
    assert operator.left() == []


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("memory_mib: 0.25", "memory_mib: 0.12"), 3, "do not"),
        (("peak_gflops", "peak_gflop"), 2, "peak_gflop"),
    ],
)
def test_what_is_wrong_at_the_start_of_a_detached_launch_is_told(
    operator: Operator, change: tuple[str, str], code: int, words: str
) -> None:
    edit(operator.folder / "cluster.yaml", change)
    result = operator.do("launch", "job.yaml", "--detach")
    assert (result.exit_code, result.out) == (code, "")
    assert result.err.startswith("hethub: ") and words in result.err
    assert operator.left() == [] and list(operator.temporary.iterdir()) == []


def test_a_worker_that_fails_ends_a_detached_launch_with_its_reason(operator: Operator) -> None:
    edit(
        operator.folder / "job.yaml",
        ("output: run", "output: run\nfault: {device: b/0/0, step: 0, action: join, do: kill}"),
    )
    result = operator.do("launch", "job.yaml", "--detach")
    assert result.exit_code == 1 and "device b/0/0" in result.err
    state = operator.status()
    assert (state["state"], state["exit_code"]) == ("failed", 1) and "b/0/0" in state["why"]
    said = operator.do("logs", "run", "--device", "driver", "--follow")  # ends, since the run has
    assert "hethub: rank 1, device b/0/0" in said.out
