"""A worker that dies or raises, and Ctrl-C: the job ends, says who, where and why, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.launch.small_job import edit, launched, write_job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A job that goes on until it is stopped."""
    write_job(tmp_path)
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
    assert "FloatingPointError" in log.read_text()


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
