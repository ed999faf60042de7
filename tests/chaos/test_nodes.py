"""A Ray cluster of three nodes, one for each device type, that loses one: real raylets, as on several machines."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.three_types import JOB, check_invariants, ended, launch, write_job
from tests.launch.small_job import Launch

STEPS = JOB["steps"]
RESOURCES = {"a": {"hethub_fast": 1}, "b": {"hethub_middle": 2}, "c": {"hethub_slow": 2}}


@pytest.fixture
def nodes() -> Iterator[tuple[str, dict[str, Any]]]:
    """The cluster's address, and its Ray nodes by the group of devices that they hold."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        found = {name: cluster.add_node(num_cpus=1, resources=needs) for name, needs in RESOURCES.items()}
        yield cluster.address, found
    finally:
        cluster.shutdown()


def processes_of(node: Any) -> list[int]:
    """A raylet and all that it started."""
    (raylet,) = [info.process.pid for info in node.all_processes["raylet"]]
    found = [raylet]
    for process in found:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        found.extend(map(int, children))
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_or_hung_node_is_told_as_one_and_the_rest_is_planned_anew(
    tmp_path: Path, nodes: tuple[str, dict[str, Any]], number: signal.Signals
) -> None:
    """Row 3: the raylet, the host and the workers of a node at one moment."""
    address, by_group = nodes
    write_job(tmp_path / "unbroken")
    unbroken = launch(tmp_path / "unbroken")
    here = tmp_path / "broken"
    policy = {"on_failure": {"restart": "replan"}, "ray": {"address": address}}
    # Slow enough that the node is lost in the middle.
    write_job(here, **policy)
    text = (here / "cluster.yaml").read_text()
    (here / "cluster.yaml").write_text(text.replace("time_scale: 5", "time_scale: 50"))
    started = Launch(here)
    try:
        started.training()
        gone = processes_of(by_group["c"])
        for process in gone:
            os.kill(process, number)
        ran = ended(started)
    finally:
        for process in processes_of(by_group["c"]) if number == signal.SIGSTOP else []:
            os.kill(process, signal.SIGKILL)
    check_invariants(ran, unbroken, STEPS, relative=1e-5)
    (failed,) = [event for event in ran.journal() if event.event == "failed"]
    assert set(failed.lost) == {"c/0/0", "c/0/1"} and failed.cause == "node"
