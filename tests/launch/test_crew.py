"""The crew on a real Ray node whose accelerators are only numbers in an environment variable."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hethub.errors import MachineError
from hethub.launch import crew as module
from hethub.launch.crew import Crew, resource_name
from hethub.launch.environment import code_digest
from hethub.specs.cluster import Cluster, load_cluster

CLUSTER = """\
name: three-gpus
device_types: {gpu: {catalog: A100-40GB}}
node_groups:
  - {name: a, device_type: gpu, nodes: 1, devices_per_node: 3, intra_link: nvlink3, inter_link: roce-200g, zone: hall}
"""


@pytest.fixture
def address() -> Iterator[str]:
    """A Ray node that says it has three GPUs. Nothing here computes on one."""
    from ray.cluster_utils import Cluster as RayCluster

    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there
    ray_cluster = RayCluster()
    try:
        ray_cluster.add_node(num_cpus=1, num_gpus=3, resources={resource_name("gpu"): 3})
        yield ray_cluster.address
    finally:
        ray_cluster.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    return load_cluster(tmp_path / "cluster.yaml")[0]


def accelerators(logs: Path) -> dict[str, list[str]]:
    """Device -> the accelerator of each worker that it has had, as their logs say."""
    return {
        log.stem.replace("-", "/"): [
            line.partition("CUDA_VISIBLE_DEVICES=")[2]
            for line in log.read_text().splitlines()
            if line.startswith("device index ")
        ]
        for log in sorted(logs.glob("*.log"))
    }


def started(crew: Crew) -> None:
    """Workers answer once they have written the first line of their logs."""
    crew.prepare()
    assert set(crew.call("results", (0,))) == set(crew.devices)


def test_a_node_with_another_program_is_refused_and_both_digests_are_told(
    tmp_path: Path, address: str, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 24 of the matrix of faults."""
    monkeypatch.setattr(module, "code_digest", lambda: "f" * 64)
    (tmp_path / "logs").mkdir()
    with Crew(cluster, [0, 1, 2], tmp_path / "logs", address) as crew:
        words = f"node a/0 runs another HetHub: .* {code_digest()[:16]}, the driver's {'f' * 16}"
        with pytest.raises(MachineError, match=words):
            crew.prepare()
    assert list((tmp_path / "logs").iterdir()) == []  # before any worker


def test_a_worker_sees_its_own_accelerator_again_when_a_plan_without_another_replaces_it(
    tmp_path: Path, address: str, cluster: Cluster
) -> None:
    """Seen to fail with the place among the devices that are left: a/0/2's new worker got a/0/1's accelerator."""
    logs = tmp_path / "logs"
    logs.mkdir()
    with Crew(cluster, [0, 1, 2], logs, address) as crew:
        started(crew)
        own = {"a/0/0": ["0"], "a/0/1": ["1"], "a/0/2": ["2"]}
        assert accelerators(logs) == own
        left = replace(cluster, exclude=frozenset({"a/0/0"}))
        crew.regroup(left, [0, 1], {"a/0/0", "a/0/2"})
        started(crew)
        assert accelerators(logs) == own | {"a/0/2": ["2", "2"]}
