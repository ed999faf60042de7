"""`runs`, `status`, `logs`, `stop` and `report` on folders that no driver works on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from hethub.launch.journal import Event, Journal
from hethub.launch.run_folder import RunFolder
from tests.launch.small_job import Result, hethub


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that failed."""
    held = RunFolder(tmp_path / "runs" / "one")
    held.open({"hethub": "0", "cluster": "two", "steps": 9, "started_unix_seconds": 1.7e9, "emulated": True})
    (held.path / "logs" / "a-0-0.log").write_text("first\nwithout an end")
    (held.path / "logs" / "driver.log").write_text("said\n")
    held.close()
    journal = Journal(held.path)
    journal.add(Event(event="began", attempt=1, step=0, plan="p", devices=("a/0/0",)))
    journal.add(Event(event="gave_up", attempt=1, step=4, reason="rank 0 died", exit_code=1))
    return held.path


def test_a_failed_run_stands_in_the_list_with_why(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path
) -> None:
    told = hethub(capsys, tmp_path, "runs")
    header, row = (line.split("\t") for line in told.out.splitlines())
    found = dict(zip(header, row, strict=True))
    assert (found["run"], found["state"], found["steps"], found["why"]) == (
        "one",
        "failed",
        "0/9",
        "rank 0 died",
    )
    assert found["cluster"] == "two (emulated)"
    (one,) = json.loads(hethub(capsys, tmp_path, "runs", "--json").out)["runs"]
    assert one["exit_code"] == 1 and one["folder"] == "runs/one"


def test_its_status_says_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path) -> None:
    lines = hethub(capsys, tmp_path, "status", run).out.splitlines()
    assert "state\tfailed: rank 0 died" in lines and "exit code\t1" in lines
    assert any(line.startswith("devices\t1 of two (emulated): a/0/0") for line in lines)


def test_a_name_or_a_reason_cannot_steer_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path
) -> None:
    """Seen to catch: a folder's name printed as it is, which ended in a traceback where it is no UTF-8."""
    evil = run.with_name("\x1b[2J\x1b]0;title\x07\u202e\udcff")
    run.rename(evil)
    Journal(evil).add(Event(event="gave_up", attempt=1, step=4, reason="\x1b[31mdied\x1b[0m", exit_code=1))
    for command in ("runs", "status", "stop", "top"):
        told = hethub(capsys, tmp_path, command, *([] if command == "runs" else [evil]))
        assert told.exit_code == 0, told.err
        assert all(c.isprintable() or c in "\t\n" for c in told.out), told.out
        assert r"\x1b[31mdied" in told.out and r"\x1b[2J" in told.out
    refused = hethub(capsys, tmp_path, "status", evil / "\x1b[2J")
    assert refused.exit_code == 2 and "\x1b" not in refused.err and r"\x1b[2J" in refused.err


def test_logs_are_told_apart_and_a_last_line_without_an_end_is_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path
) -> None:
    assert hethub(capsys, tmp_path, "logs", run).out.splitlines() == [
        "a-0-0: first",
        "a-0-0: without an end",
        "driver: said",
    ]
    lines = hethub(capsys, tmp_path, "logs", run, "--json").out.splitlines()
    assert json.loads(lines[-1]) == {"writer": "driver", "line": "said"}
    alone = hethub(capsys, tmp_path, "logs", run, "--device", "a/0/0", "--follow")  # the run has ended
    assert alone.out.splitlines() == ["first", "without an end"]


def test_stopping_it_says_that_it_had_ended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, run: Path
) -> None:
    told = hethub(capsys, tmp_path, "stop", run)
    assert told.exit_code == 0 and f"{run}: it had ended" in told.out and "state\tfailed" in told.out


@pytest.mark.parametrize("command", ["status", "logs", "stop", "top", "report", "replan"])
def test_a_folder_that_is_no_run_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    told = hethub(capsys, tmp_path, command, tmp_path)
    assert told.exit_code == 2 and str(tmp_path) in told.err and told.out == ""


def test_none_of_them_loads_what_only_training_needs(tmp_path: Path, run: Path) -> None:
    code = """
import sys
from hethub.cli.main import run
for command in ("runs", "status", "logs", "report", "top"):
    sys.argv = ["hethub", command, "runs" if command == "runs" else "runs/one"]
    try:
        run()
    except SystemExit as end:
        assert not end.code, (command, end.code)
print([name for name in ("torch", "ray", "plotly", "scipy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# -- other users ---------------------------------------------------------------------------------------------

_NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that all users reach, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="hh-"))
    folder.chmod(0o755)
    yield folder
    for path in folder.iterdir():
        path.chmod(0o755)
    shutil.rmtree(folder)


def by_another_user(work: Callable[[], Result]) -> Result:
    """What `work` does in a fork that is nobody's where this process is root's, to whom no file is closed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.chdir("/")  # which another user may enter
            if os.getuid() == 0:
                os.setuid(_NOBODY)
            os.write(writer, json.dumps(asdict(work())).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        told = stream.read()
    os.waitpid(child, 0)
    assert told, "it ended with a traceback"
    return Result(**json.loads(told))


def test_runs_that_are_damaged_or_another_users_do_not_spoil_the_list(
    capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    """Seen to catch: a PermissionError of a folder that is closed; no list at all for one damaged mark."""
    for name in ("closed", "damaged", "one"):
        held = RunFolder(shared / name)
        held.open({"steps": 9})
        held.close()
    (shared / "damaged" / "run.json").write_text('{"torn')
    (shared / "closed").chmod(0)
    hethub(capsys, shared, "runs", "one")  # another user may not reach what it imports
    told = by_another_user(lambda: hethub(capsys, shared, "runs", "."))
    assert told.exit_code == 0, told.err
    assert [line.split("\t")[0] for line in told.out.splitlines()] == ["run", "one"]
    refused = by_another_user(lambda: hethub(capsys, shared, "runs", "closed/runs"))
    assert refused.exit_code == 2
    assert refused.err.startswith("hethub: closed/runs: cannot be read (Permission denied).")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_stopping_another_users_run_names_the_user(capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    """Seen to catch: a PermissionError."""
    held = RunFolder(shared / "one")
    held.open({"steps": 9})
    hethub(capsys, shared, "status", "one")
    told = by_another_user(lambda: hethub(capsys, shared, "stop", "one"))
    held.close()
    assert told.exit_code == 2
    assert f"its driver, process {os.getpid()}, is user root's" in told.err
