"""A Ray cluster of three nodes, one for each device type, that loses one: real raylets, as on several machines."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.three_types import JOB, Ran, check_invariants, ended, write_job
from tests.launch.small_job import Launch

STEPS = JOB["steps"]
HASTY = "from hethub.launch import crew\ncrew._GATHER_FAILURES_SECONDS = 0.0"
ALLOWED_SECONDS = 20.0
RESOURCES = {"a": {"hethub_fast": 1}, "b": {"hethub_middle": 2}, "c": {"hethub_slow": 2}}


@pytest.fixture
def nodes() -> Iterator[tuple[str, dict[str, Any]]]:
    """The cluster's address, and its Ray nodes by the group of devices that they hold."""
    from ray.cluster_utils import Cluster

    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there
    cluster = Cluster()
    try:
        found = {name: cluster.add_node(num_cpus=1, resources=needs) for name, needs in RESOURCES.items()}
        yield cluster.address, found
    finally:
        cluster.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)


def processes_of(node: Any, *, workers: bool = True) -> list[int]:
    """A raylet and all that it started, its host's workers or not."""
    found = [node.all_processes["raylet"][0].process.pid]
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    for process in found:
        if workers or b"fork_server" not in command(process):
            found.extend(child for child, parent in parents.items() if parent == process)
    return found


def command(process: int) -> bytes:
    """Its command line; empty when it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGKILL, True),
        pytest.param(signal.SIGSTOP, True, marks=pytest.mark.chaos),
        pytest.param(signal.SIGSTOP, False, marks=pytest.mark.chaos),
    ],
)
def test_a_lost_or_hung_node_is_told_as_one_and_the_rest_is_planned_anew(
    unbroken: Ran, tmp_path: Path, nodes: tuple[str, dict[str, Any]], number: signal.Signals, workers: bool
) -> None:
    """Row 3: the raylet, the host and the workers of a node at one moment; or all but the workers, so that training
    goes on and only the host's silence tells. Ray's own health checks have their defaults, by which a hung node takes a
    minute. Seen to fail without `Crew._silent_hosts`: the run waited for answers that the stopped host kept.

    The driver does not wait here for more than the first word of it, which is a survivor's: under load that comes long
    before Ray's. It was seen to begin anew on the lost devices, for nothing had failed but a connection.
    """
    address, by_group = nodes
    write_job(tmp_path, on_failure={"restart": "replan"}, ray={"address": address})
    # Slow enough that the node is lost in the middle.
    text = (tmp_path / "cluster.yaml").read_text()
    (tmp_path / "cluster.yaml").write_text(text.replace("time_scale: 5", "time_scale: 50"))
    started = Launch(tmp_path, before=HASTY)
    gone: list[int] = []
    try:
        started.training()
        gone = processes_of(by_group["c"], workers=workers)
        for process in gone:
            os.kill(process, number)
        lost_at = time.time()
        ran = ended(started)
    finally:
        for process in gone:  # those that are only stopped
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    check_invariants(ran, unbroken, STEPS, relative=1e-5)
    failures = [event for event in ran.journal() if event.event == "failed"]
    assert len(failures) == 1, failures
    (failed,) = failures
    assert set(failed.lost) == {"c/0/0", "c/0/1"} and failed.cause == "node"
    if number == signal.SIGSTOP:  # times count in `make chaos` only
        (recovered,) = [event for event in ran.journal() if event.event == "recovered"]
        assert recovered.at_unix_seconds - lost_at <= ALLOWED_SECONDS
