"""One driver at a time, on whatever host; who has been replaced knows it."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from hethub.errors import InputError
from hethub.launch import lease as module
from hethub.launch.lease import LEASE, Lease, LeaseWatch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(module, "OBSERVE_SECONDS", 0.3)


def elsewhere(folder: Path) -> None:
    """A lease of a process on another host."""
    (folder / LEASE).write_text(json.dumps({"token": "theirs", "host": "elsewhere", "process": 1}))


def test_a_lease_that_is_held_is_refused_and_a_released_one_taken(tmp_path: Path) -> None:
    one, other = Lease(tmp_path), Lease(tmp_path)
    one.take()
    with pytest.raises(InputError, match=f"another driver runs it: process {os.getpid()} on "):
        other.take()
    one.release()
    assert not (tmp_path / LEASE).exists()
    other.take()
    assert other.held() and not one.held()
    other.release()


def test_a_lease_that_stands_still_is_taken_over(tmp_path: Path) -> None:
    """Its holder is on another host, so nobody can look whether it lives."""
    elsewhere(tmp_path)
    lease = Lease(tmp_path)
    lease.take()
    assert lease.held()
    lease.release()


def test_the_lease_of_a_dead_process_on_this_host_is_taken_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "OBSERVE_SECONDS", 1e9)
    one = Lease(tmp_path)
    one.take()
    one._end.set()  # dies without a word
    held = json.loads((tmp_path / LEASE).read_text())
    (tmp_path / LEASE).write_text(json.dumps({**held, "process": 2**22 + 1}))  # above every process number
    other = Lease(tmp_path)
    other.take()
    other.release()


def test_who_has_been_replaced_knows_and_does_not_touch_the_other_lease(tmp_path: Path) -> None:
    one = Lease(tmp_path)
    one.take()
    elsewhere(tmp_path)
    assert not one.held()
    one.release()
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "theirs"


def test_a_worker_ends_when_the_lease_stands_still_or_is_anothers(tmp_path: Path, monkeypatch) -> None:
    elsewhere(tmp_path)
    watch = LeaseWatch(tmp_path / LEASE, "theirs")
    assert not watch.lost()
    monkeypatch.setattr(module, "LIMIT_SECONDS", -1.0)
    assert watch.lost()
    monkeypatch.setattr(module, "LIMIT_SECONDS", 1e9)
    os.utime(tmp_path / LEASE, ns=(1, 1))
    assert not watch.lost()
    monkeypatch.setattr(module, "BEAT_SECONDS", -1.0)
    assert LeaseWatch(tmp_path / LEASE, "another").lost()


def test_a_file_that_is_no_lease_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / LEASE).write_text("[1, 2")
    lease = Lease(tmp_path)
    lease.take()
    lease.release()


def test_a_worker_that_cannot_look_at_the_lease_once_goes_on(tmp_path: Path, monkeypatch) -> None:
    """Seen to fail: a single look that failed ended the worker, for looks are farther apart than two beats."""
    elsewhere(tmp_path)
    watch = LeaseWatch(tmp_path / LEASE, "theirs")
    monkeypatch.setattr(module, "BEAT_SECONDS", -1.0)  # two beats are over at every look
    (tmp_path / LEASE).rename(tmp_path / "aside")
    assert not watch.lost()
    (tmp_path / LEASE).mkdir()  # there, but cannot be read
    assert not watch.lost()
    monkeypatch.setattr(module, "LIMIT_SECONDS", -1.0)
    assert watch.lost()


def test_a_lease_that_cannot_be_read_just_now_is_still_held_and_one_that_is_gone_is_not(
    tmp_path: Path,
) -> None:
    """Seen to fail: a single read that failed ended the driver and the beats."""
    lease = Lease(tmp_path)
    lease.path.mkdir()
    assert lease.held()
    lease.path.rmdir()
    assert not lease.held()


def test_a_beat_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail: the thread ended with the error, and the run with it 20 s later."""
    real, beaten, failed = os.utime, threading.Event(), []

    def fails_once(path: Path) -> None:
        if not failed:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(path)
        beaten.set()

    monkeypatch.setattr(os, "utime", fails_once)
    lease = Lease(tmp_path)
    lease.take()
    try:
        assert beaten.wait(30)
    finally:
        lease.release()
