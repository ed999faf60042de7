"""Connections that are cut end for both sides; those of others stay. Nobody listens where a network reaches it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from hethub.launch.sockets import Connections, open_store
from tests.launch.small_job import Launch, edit, marked, write_job

LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def pair(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    one = socket.create_connection(listener.getsockname())
    other, _ = listener.accept()
    return one, other


def test_what_was_opened_in_between_is_cut_and_nothing_else() -> None:
    """Seen to catch: connections of before cut as well, as Ray's are."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = pair(listener)
        connections = Connections()
        ours, gone = pair(listener), pair(listener)
        connections.note()
        after = pair(listener)
        number = gone[0].fileno()
        gone[0].close()
        os.dup2(after[0].fileno(), number)  # its number is another's by now
        connections.cut()
        assert ours[0].recv(1) == b"" and ours[1].recv(1) == b""
        for one, other in (before, after):
            one.sendall(b"x")
            assert other.recv(1) == b"x"
        os.close(number)
        for sockets in (before, ours, after, gone):
            for one in sockets:
                one.close()


def listeners() -> dict[str, tuple[str, int]]:
    """inode -> (address, port) of every TCP socket of this machine that listens."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                address, _, port = local.partition(":")
                found[inode] = (address, int(port, 16))
    return found


def content(process: int, name: str) -> bytes:
    return Path(f"/proc/{process}", name).read_bytes()


def sockets_of(process: int) -> set[str]:
    """inodes."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{process}/fd").iterdir()]
    return {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}


def test_the_store_of_a_job_listens_on_one_address_and_serves_there() -> None:
    """Seen to catch: torch's own choice, which is every interface."""
    store = open_store("127.0.0.1")
    assert [address for address, port in listeners().values() if port == store.port] == ["0100007F"]
    store.set("key", "value")
    assert dist.TCPStore("127.0.0.1", store.port, is_master=False).get("key") == b"value"
    with pytest.raises(OSError, match="assign"):
        open_store("192.0.2.77")


STRANGER = """
import sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
except BaseException as error:
    print("refused", type(error).__name__, error)
else:
    print("let in")
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """A launch that trains until all have looked at its sockets."""
    folder = tmp_path_factory.mktemp("running")
    write_job(folder)
    edit(folder / "job.yaml", ("steps: 3", "steps: 100000"), ("evaluate: {every: 3, rows: 16}\n", ""))
    launch = Launch(folder)
    try:
        launch.training()
        yield launch
        launch.process.send_signal(signal.SIGINT)
        launch.end()
    finally:
        launch.close()


def test_a_stranger_is_not_let_into_the_ray_that_a_run_starts(running: Launch) -> None:
    """Its servers listen on every interface, and who is let in runs code. Seen to fail with RAY_AUTH_MODE=disabled."""
    (head,) = [n for n in marked(running.temporary) if b"gcs_server" in content(n, "cmdline").split(b"\0")[0]]
    table = listeners()
    ports = [table[inode][1] for inode in sockets_of(head) if inode in table]
    answers = [
        subprocess.run(
            [sys.executable, "-c", STRANGER, f"127.0.0.1:{port}"],
            env={**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        ).stdout
        for port in ports
    ]
    assert answers and all(answer.startswith("refused") for answer in answers), answers


def test_who_joins_a_ray_without_its_token_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to catch: Ray's own error, which is none of those that a wrong address raises, as a traceback."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path))  # where a token would lie
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    write_job(tmp_path)
    edit(tmp_path / "job.yaml", ("output: run", "output: run\nray: {address: '127.0.0.1:6379'}"))
    launch = Launch(tmp_path)
    try:
        result = launch.end()
    finally:
        launch.close()
    assert result.exit_code == 4 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("hethub: ray address 127.0.0.1:6379: Token authentication")


def test_workers_and_the_agent_of_a_run_listen_on_loopback_only(running: Launch) -> None:
    ours = [
        number
        for number in marked(running.temporary)
        if re.search(rb"hethub\.(launch\.fork_server|telemetry\.agent)", content(number, "cmdline"))
    ]
    table = listeners()
    found = {table[inode] for number in ours for inode in sockets_of(number) if inode in table}
    assert len(ours) >= 4  # what workers are forked from, two workers, the agent
    assert found and all(address in LOOPBACK for address, _ in found), found
