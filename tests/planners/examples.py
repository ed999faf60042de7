"""Small planning problems: random ones, and a cluster whose types are 1 : 2 : 4 fast."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from hethub.planners.interface import Problem
from hethub.specs.cluster import Cluster
from hethub.specs.workload import Model, Workload
from tests.plan_strategies import clusters, models, three_speeds, tiny_model

__all__ = ["one_two_four", "only_across_nodes", "problems", "with_memory", "workload"]

MIB = 1 << 20


def workload(model: Model, *, batch: int = 8, precision: str = "fp32") -> Workload:
    return Workload(
        model=model, sequence_length=16, global_batch=batch, precision=precision, optimizer="adamw"
    )


def with_memory(cluster: Cluster, size_bytes: int) -> Cluster:
    """The same cluster with that much memory on every device."""
    types = {name: replace(t, memory_bytes=size_bytes) for name, t in cluster.device_types.items()}
    return replace(cluster, device_types=types)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 6 devices, from plenty of memory down to none to speak of."""
    model = draw(models())
    cluster = with_memory(draw(clusters()), draw(st.integers(8, 600)) * 1024)
    return Problem.of(cluster, workload(model, batch=draw(st.integers(1, 12))))


def one_two_four(*, memory_bytes: int = 64 * MIB) -> Problem:
    """Two devices each of three types whose speeds are as 1 : 2 : 4."""
    cluster = with_memory(three_speeds(), memory_bytes)
    speeds = {"fast": 4.0, "middle": 2.0, "slow": 1.0}
    types = {
        name: replace(
            t,
            peak_flops_per_second={"fp32": speeds[name] * 1e9},
            memory_bandwidth_bytes_per_second=speeds[name] * 1e9,
        )
        for name, t in cluster.device_types.items()
    }
    model = tiny_model(layers=12, heads=8)
    return Problem.of(replace(cluster, device_types=types), workload(model, batch=24))


def only_across_nodes() -> Problem:
    """Two nodes of one device, and a model that they hold only where each layer is divided between both: no group of
    the search does that, the even split does."""
    middle = three_speeds().node_groups[1]
    types = {middle.device_type: three_speeds().device_types[middle.device_type]}
    cluster = replace(three_speeds(), device_types=types, node_groups=(middle,), links=())
    return Problem.of(with_memory(cluster, 60 << 10), workload(tiny_model(layers=1), batch=2))
