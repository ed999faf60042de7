"""Workers that are forked from a warm process: they answer, know their environment, and never outlive their owner."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hethub.launch.fork_server import ForkServer
from hethub.launch.worker_process import HEADER, Failure, frame, pack, unpack

_END_SECONDS = 30.0


@pytest.fixture(scope="module")
def forks() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


def ask(connection: socket.socket, number: int, method: str, *arguments: object) -> None:
    connection.sendall(frame(number, method, pack(arguments)))


def answered(connection: socket.socket) -> tuple[int, object]:
    with connection.makefile("rb") as stream:
        number, _, size = HEADER.unpack(stream.read(HEADER.size))
        return number, unpack(stream.read(size))


def has_ended(process: int) -> bool:
    """Whether a process ends within the limit."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    found = bool(select.select([descriptor], [], [], _END_SECONDS)[0])
    os.close(descriptor)
    return found


def test_a_worker_answers_each_call_by_its_number_and_tells_a_failure(
    forks: ForkServer, tmp_path: Path
) -> None:
    _, connection = forks.fork(3, tmp_path / "log", {})
    with connection:
        ask(connection, 7, "results", 0)
        assert answered(connection) == (7, [])
        ask(connection, 8, "evaluate", 5)
        number, failure = answered(connection)
        assert number == 8 and isinstance(failure, Failure)
        assert (failure.device, failure.action) == (3, "evaluate") and "before join" in failure.reason
    assert "AssertionError: evaluate before join" in (tmp_path / "log").read_text()


def test_a_worker_starts_with_everything_imported_and_its_own_environment_and_log(
    forks: ForkServer, tmp_path: Path
) -> None:
    """A second one has neither the first's environment nor its log."""
    for number, environment in enumerate([{"SEEN": "2"}, {}]):
        process, connection = forks.fork(number, tmp_path / f"log-{number}", environment)
        with connection:
            ask(connection, 1, "results", 0)
            answered(connection)
            first = (tmp_path / f"log-{number}").read_text()
            assert first.startswith(f"device index {number}, process {process}, host ")
            assert "torch" in Path(f"/proc/{process}/maps").read_text()
            assert (
                len(list(Path(f"/proc/{process}/task").iterdir())) <= 3
            )  # its own thread, and two for calls
    assert len({(tmp_path / f"log-{n}").read_text() for n in range(2)}) == 2


def test_a_worker_ends_when_the_other_end_of_its_connection_does(forks: ForkServer, tmp_path: Path) -> None:
    process, connection = forks.fork(0, tmp_path / "log", {})
    other, kept = forks.fork(1, tmp_path / "log", {})
    connection.close()
    assert has_ended(process)
    with kept:
        ask(kept, 1, "results", 0)
        assert answered(kept) == (1, []) and os.pidfd_open(other) > 0


OWNER = """
import sys, time
from pathlib import Path
from hethub.launch.fork_server import ForkServer
forks = ForkServer()
held = [forks.fork(n, Path(sys.argv[1]), {}) for n in range(2)]
print(forks._process.pid, *(process for process, _ in held), flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("killed", ["owner", "server"])
def test_nobody_is_left_when_the_owner_or_the_server_is_killed_a_stopped_worker_neither(
    tmp_path: Path, killed: str
) -> None:
    """Seen to fail without PR_SET_PDEATHSIG: the stopped worker stayed."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "log")], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        server, *workers = map(int, owner.stdout.readline().split())
        os.kill(workers[0], signal.SIGSTOP)
        os.kill(owner.pid if killed == "owner" else server, signal.SIGKILL)
        assert all(has_ended(process) for process in (server, *workers))
        owner.kill()
