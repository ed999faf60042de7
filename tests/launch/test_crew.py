"""The crew on a real Ray node whose accelerators are only numbers in an environment variable."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from hethub.errors import MachineError
from hethub.launch import crew as module
from hethub.launch.crew import Crew, resource_name
from hethub.launch.environment import code_digest
from hethub.launch.node_host import accelerator_of
from hethub.specs.cluster import Cluster, load_cluster
from tests.launch.small_job import Launch, left_behind, write_job

CLUSTER = """\
name: three-gpus
device_types: {gpu: {catalog: A100-40GB}}
node_groups:
  - {name: a, device_type: gpu, nodes: 1, devices_per_node: 3, intra_link: nvlink3, inter_link: roce-200g, zone: hall}
"""
UNLIKE = """\
name: two-vendors
device_types:
  npu: {catalog: Ascend-910B2}
  mlu: {catalog: MLU590}
node_groups:
  - {name: a, device_type: npu, nodes: 1, devices_per_node: 2, intra_link: hccs, inter_link: roce-200g, zone: hall}
  - {name: b, device_type: mlu, nodes: 1, devices_per_node: 3, intra_link: mlu-link, inter_link: roce-200g, zone: hall}
exclude: [b/0/0]
"""
LOCAL = """
import sys
from pathlib import Path
from hethub.launch.crew import Crew
from hethub.specs.cluster import load_cluster

folder = Path(sys.argv[1])
with Crew(load_cluster(folder / "cluster.yaml")[0], [0, 1, 2], folder / "logs", None) as crew:
    crew.prepare()
    assert set(crew.call("results", (0,))) == {0, 1, 2}
"""


@contextmanager
def ray_node(num_gpus: int, resources: dict[str, float]) -> Iterator[str]:
    """The address of a Ray node that says it has these. Nothing here computes on one."""
    from ray.cluster_utils import Cluster as RayCluster

    on_sigterm = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there
    ray_cluster = RayCluster()
    try:
        ray_cluster.add_node(num_cpus=1, num_gpus=num_gpus, resources=resources)
        yield ray_cluster.address
    finally:
        ray_cluster.shutdown()
        signal.signal(signal.SIGTERM, on_sigterm)


@pytest.fixture
def address() -> Iterator[str]:
    """A Ray node with three GPUs."""
    with ray_node(3, {resource_name("gpu"): 3}) as found:
        yield found


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    return load_cluster(tmp_path / "cluster.yaml")[0]


def accelerators(logs: Path) -> dict[str, list[str]]:
    """Device -> the accelerator of each worker that it has had, as their logs say: variable=number."""
    return {
        log.stem.replace("-", "/"): [
            line.rpartition(", ")[2]
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
        own = {f"a/0/{index}": [f"CUDA_VISIBLE_DEVICES={index}"] for index in range(3)}
        assert accelerators(logs) == own
        left = replace(cluster, exclude=frozenset({"a/0/0"}))
        crew.regroup(left, [0, 1], {"a/0/0", "a/0/2"})
        started(crew)
        assert accelerators(logs) == own | {"a/0/2": 2 * own["a/0/2"]}


def test_gpus_are_asked_of_a_ray_that_is_started_here(tmp_path: Path, cluster: Cluster) -> None:
    """A process of its own, since Ray keeps its tokens to a process. Seen to fail with GPU among the custom resources:
    Ray's AssertionError."""
    (tmp_path / "logs").mkdir()
    temporary = Path(tempfile.mkdtemp(prefix="hh-"))  # Ray's sockets need a short path
    try:
        done = subprocess.run(
            [sys.executable, "-c", LOCAL, str(tmp_path)],
            env={n: v for n, v in os.environ.items() if n != "CUDA_VISIBLE_DEVICES"}
            | {"TMPDIR": str(temporary)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert accelerators(tmp_path / "logs") == {
            f"a/0/{index}": [f"CUDA_VISIBLE_DEVICES={index}"] for index in range(3)
        }
        assert left_behind(temporary) == []
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def test_accelerators_that_are_no_gpus_are_shared_out_too(tmp_path: Path) -> None:
    """Ray hands out NPUs; MLUs it does not know, so they have the numbers of the machine, whose first is left out.
    Seen to fail with GPUs alone: no worker was told of any, and all would have opened the first."""
    (tmp_path / "cluster.yaml").write_text(UNLIKE)
    logs = tmp_path / "logs"
    logs.mkdir()
    offer = {resource_name("npu"): 2, "NPU": 2, resource_name("mlu"): 2}
    cluster = load_cluster(tmp_path / "cluster.yaml")[0]
    with ray_node(0, offer) as found, Crew(cluster, [0, 1, 2, 3], logs, found) as crew:
        started(crew)
        assert accelerators(logs) == {
            "a/0/0": ["ASCEND_RT_VISIBLE_DEVICES=0"],
            "a/0/1": ["ASCEND_RT_VISIBLE_DEVICES=1"],
            "b/0/1": ["MLU_VISIBLE_DEVICES=1"],
            "b/0/2": ["MLU_VISIBLE_DEVICES=2"],
        }


def test_a_worker_sees_one_of_those_listed_and_too_few_are_told() -> None:
    assert accelerator_of("MLU_VISIBLE_DEVICES", "4,6", 1) == "6"
    assert accelerator_of("MLU_VISIBLE_DEVICES", "", 1) == "1"
    with pytest.raises(
        MachineError, match=r"^MLU_VISIBLE_DEVICES=4,6 lists 2 .* at least 3 workers .*\. Start Ray"
    ):
        accelerator_of("MLU_VISIBLE_DEVICES", "4,6", 2)


def test_a_folder_that_ray_cannot_use_is_told_in_a_line(tmp_path: Path) -> None:
    """Seen to catch: a traceback, for Ray raises OSError where its sockets' paths are too long."""
    write_job(tmp_path)
    long = tmp_path / ("long" * 10)
    long.mkdir()
    launch = Launch(tmp_path, before=f"import os\nos.environ['TMPDIR'] = {str(long)!r}")
    try:
        result = launch.end()
    finally:
        launch.close()
    assert result.exit_code == 4 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert (
        last.startswith("hethub: no Ray can be started here: ")
        and "TMPDIR" in last
        and "27 characters" in last
    )
    assert list(long.iterdir()) == []
