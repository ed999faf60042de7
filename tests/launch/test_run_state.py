"""What a run folder says of its run, from the files that driver and workers leave."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from hethub.errors import InputError
from hethub.files import write_json
from hethub.launch import lease as lease_module
from hethub.launch.beacon import Beacon
from hethub.launch.history import HISTORY, Entry, history_file
from hethub.launch.journal import Event, Journal
from hethub.launch.lease import LEASE, Lease
from hethub.launch.run_folder import SUMMARY, RunFolder
from hethub.launch.run_state import list_runs, read_run

DEVICES = ("a/0/0", "b/0/0")
BEGAN = Event(event="began", attempt=1, step=0, plan="p", devices=DEVICES)
FAILED = Event(event="failed", attempt=1, step=3, device="a/0/0", action="step 3, x", reason="died")
GAVE_UP = Event(event="gave_up", attempt=1, step=3, reason="a/0/0 died", exit_code=1)
STOPPED = Event(event="stopped", attempt=1, step=3)
MARK = {
    "hethub": "0",
    "job_file": "/job.yaml",
    "started_unix_seconds": 1.7e9,
    "cluster": "two",
    "emulated": True,
    "steps": 9,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that no driver has written into yet."""
    held = RunFolder(tmp_path / "run")
    held.open(MARK)
    held.close()
    return held.path


def record(folder: Path, device: str, steps: int, attempt: int = 1, digests: int = 0) -> None:
    (folder / HISTORY).mkdir(exist_ok=True)
    with history_file(folder / HISTORY, device).open("ab") as stream:
        for step in range(steps):
            entry = Entry(
                run="run",
                attempt=attempt,
                step=step,
                device=device,
                devices=2,
                plan="p",
                batch=4,
                epoch=9,
                loss=(3.0 - step / 4).hex(),
                digests=dict.fromkeys(range(digests), "0" * 16),
            )
            stream.write(entry.model_dump_json(exclude_defaults=True).encode() + b"\n")
        stream.write(b'{"torn')


def test_a_run_with_a_driver_is_starting_then_running_then_finishing(folder: Path) -> None:
    lease = Lease(folder)
    lease.take()
    journal = Journal(folder)
    assert read_run(folder).state == "starting"
    journal.add(BEGAN)
    run = read_run(folder)
    assert (run.state, run.process, run.host) == ("running", os.getpid(), socket.gethostname())
    journal.add(Event(event="failed", attempt=1, step=2, device="a/0/0", action="step 2, x", reason="died"))
    assert read_run(folder).why == "attempt 1 failed: a/0/0, step 2, x: died"
    journal.add(BEGAN.model_copy(update={"attempt": 2}))
    journal.add(Event(event="ended", attempt=2, step=9))
    run = read_run(folder)
    assert (run.state, run.restarts, run.goes_on) == ("finishing", 1, True)
    lease.release()
    write_json(folder / SUMMARY, {})
    run = read_run(folder)
    assert (run.state, run.exit_code, run.goes_on) == ("finished", 0, False)


@pytest.mark.parametrize("last", [BEGAN, FAILED, GAVE_UP, STOPPED])
def test_a_resumed_run_is_starting_whatever_ended_it_before(folder: Path, last: Event) -> None:
    """Seen to catch: what an earlier driver wrote last, taken for the new one's."""
    journal = Journal(folder)
    journal.add(BEGAN)
    journal.add(last)
    lease = Lease(folder)
    lease.take()
    assert (read_run(folder).state, read_run(folder).why) == ("starting", "")
    lease.release()


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (STOPPED, "asked to stop"),
        (FAILED.model_copy(update={"goes_on": False}), "a/0/0, step 3, x: died"),
        (GAVE_UP, "a/0/0 died"),
    ],
)
def test_a_run_whose_driver_is_ending_it_is_finishing_and_says_why(
    folder: Path, last: Event, why: str
) -> None:
    """Seen to catch: the driver's own end, noted before its workers are down, told as a start, and a failure that
    nothing follows told as a recovery."""
    lease = Lease(folder)
    lease.take()
    journal = Journal(folder)
    journal.add(BEGAN)
    journal.add(last)
    run = read_run(folder)
    assert (run.state, run.why, run.goes_on) == ("finishing", why, True)
    lease.release()
    assert read_run(folder).state == ("stopped" if last == STOPPED else "failed")


@pytest.mark.parametrize(
    ("event", "state", "why"),
    [
        (STOPPED, "stopped", "asked to stop"),
        (Event(event="gave_up", attempt=1, step=3, reason="no Ray", exit_code=4), "failed", "no Ray"),
        (BEGAN, "lost", "its driver is gone without a word"),
    ],
)
def test_why_a_run_without_a_driver_ended(folder: Path, event: Event, state: str, why: str) -> None:
    Journal(folder).add(event)
    run = read_run(folder)
    assert (run.state, run.why) == (state, why)


def leased(folder: Path, host: str, process: int) -> None:
    (folder / LEASE).write_text(json.dumps({"token": "t", "host": host, "process": process}))


def test_a_run_whose_driver_was_killed_is_lost(folder: Path) -> None:
    Journal(folder).add(BEGAN)
    process = os.fork()
    if not process:
        os._exit(0)
    os.waitpid(process, 0)
    leased(folder, socket.gethostname(), process)
    run = read_run(folder)
    assert run.state == "lost" and f"process {process} on" in run.why
    assert run.ended_unix_seconds is not None


def test_another_process_under_the_drivers_number_does_not_keep_a_run_alive(folder: Path) -> None:
    """Nor does a driver that is stopped: its lease is not touched."""
    Journal(folder).add(BEGAN)
    leased(folder, socket.gethostname(), os.getpid())
    os.utime(folder / LEASE, (1.7e9, 1.7e9))
    assert read_run(folder).state == "lost"


def test_a_driver_elsewhere_lives_as_long_as_it_touches_its_lease(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease_module, "OBSERVE_SECONDS", 0.3)
    Journal(folder).add(BEGAN)
    leased(folder, "elsewhere", 1)
    assert read_run(folder).state == "lost"
    monkeypatch.setattr(lease_module.socket, "gethostname", lambda: "elsewhere")
    lease = Lease(folder)
    lease.take()
    Journal(folder).add(BEGAN.model_copy(update={"attempt": 2}))
    monkeypatch.undo()
    monkeypatch.setattr(lease_module, "OBSERVE_SECONDS", 3.0)
    assert read_run(folder).state == "running"
    lease.release()


def test_steps_done_are_those_of_the_slowest_device_of_the_newest_attempt(folder: Path) -> None:
    Journal(folder).add(BEGAN)
    record(folder, "a/0/0", 5)
    record(folder, "b/0/0", 4, digests=2000)  # a last line longer than what is read at first
    run = read_run(folder)
    assert (run.steps_done, run.steps, run.loss) == (4, 9, 3.0 - 3 / 4)
    Journal(folder).add(Event(event="began", attempt=2, step=2, plan="p", devices=DEVICES))
    assert read_run(folder).steps_done == 2


def test_the_beacon_tells_in_which_steps_devices_are(folder: Path) -> None:
    lease = Lease(folder)
    lease.take()
    Journal(folder).add(BEGAN)
    Beacon.create(folder / "beacon.bin", 3)
    beacon = Beacon(folder / "beacon.bin", 3)
    assert read_run(folder).at_steps is None
    beacon.set(0, 4, 1)
    beacon.set(2, 5, 0)
    assert read_run(folder).at_steps == (4, 5)
    lease.release()


def test_runs_are_listed_newest_first_and_other_folders_left_out(folder: Path) -> None:
    other = RunFolder(folder.parent / "later")
    other.open({**MARK, "started_unix_seconds": 1.8e9})
    other.close()
    (folder.parent / "notes").mkdir()
    (folder.parent / ".targets").mkdir()  # of telemetry: a file for each run, one of which may be called run
    (folder.parent / ".targets" / "run.json").write_text("[]")
    assert [Path(run.folder).name for run in list_runs(folder.parent)] == ["later", "run"]
    assert [Path(run.folder).name for run in list_runs(folder)] == ["run"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder of a run"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        list_runs(tmp_path / "none")
