"""Clusters of CPU workers and plans for them, built in code."""

from __future__ import annotations

from collections.abc import Sequence

from hethub.specs.cluster import Cluster, DeviceType, Link, NodeGroup
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.specs.workload import Model, Workload

__all__ = ["cpu_cluster", "data_parallel", "llama_model", "pipeline", "rank_of", "tensor_parallel"]

_CORE_FLOPS_PER_SECOND = 80e9  # fp32 products of one core; only ratios of devices matter to the plans here
_CORE_BYTES_PER_SECOND = 10e9
_DEVICE_BYTES = 4 * 2**30


def llama_model(*, hidden: int, layers: int, heads: int, vocab: int = 1024) -> Model:
    """A Llama with a feed-forward layer of 8/3 of the hidden size, in whole multiples of 32."""
    return Model(
        name=f"llama-{hidden}x{layers}",
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=round(hidden * 8 / 3 / 32) * 32,
        vocab_size=vocab,
        tied=False,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        rope_scaling=None,
    )


def cpu_cluster(cores: Sequence[tuple[str, float, int]]) -> Cluster:
    """One host of CPU workers: (type name, share of a core, how many) each; not emulated."""
    memory = Link(
        name="shared-memory",
        bandwidth_bytes_per_second=1e9,
        latency_seconds=1e-4,
        transport="shared-memory",
    )
    return Cluster(
        name="cpu-workers",
        device_types={
            name: DeviceType(
                name=name,
                catalog=None,
                vendor="cpu",
                memory_bytes=_DEVICE_BYTES,
                memory_reserve_bytes=0,
                memory_bandwidth_bytes_per_second=share * _CORE_BYTES_PER_SECOND,
                peak_flops_per_second={"fp32": share * _CORE_FLOPS_PER_SECOND},
                matmul_efficiency=0.8,
                memory_efficiency=0.8,
                substitute_dtype={},
                power_watts=None,
                usd_per_hour=None,
            )
            for name, share, _ in cores
        },
        node_groups=tuple(
            NodeGroup(
                name=name,
                device_type=name,
                nodes=1,
                devices_per_node=count,
                intra_link=memory,
                inter_link=memory,
                zone="host",
            )
            for name, _, count in cores
        ),
        links=(),
        emulated_time_scale=None,
    )


def rank_of(
    model: Model, layers: tuple[int, int], device: str, share: tuple[int, int, int] | None = None
) -> Rank:
    """A device in a stage of `layers`; `share` is (heads, FFN columns, vocabulary rows), None for all of them."""
    heads, ffn, vocab = share or (model.heads, model.ffn_size, model.vocab_size)
    decoders = layers[0] <= model.layers and layers[1] > 1
    ends = layers[0] == 0 or layers[1] == model.layers + 2
    return Rank(
        device=device, heads=heads if decoders else 0, ffn=ffn if decoders else 0, vocab=vocab if ends else 0
    )


def _plan(name: str, cluster: Cluster, model: Model, sequence_length: int, one: Pipeline) -> Plan:
    workload = Workload(
        model=model,
        sequence_length=sequence_length,
        global_batch=one.micro_batches * one.micro_batch_rows,
        precision="fp32",
        optimizer="adamw",
    )
    return Plan(name=name, pipelines=[one], cluster=cluster, workload=workload)


def _names(cluster: Cluster) -> list[str]:
    return [device.name for device in cluster.devices()]


def data_parallel(
    cluster: Cluster, model: Model, sequence_length: int, rows: Sequence[int], micro_batches: int = 1
) -> Plan:
    """Every device holds the whole model; device i takes rows[i] of every micro-batch."""
    layers = (0, model.layers + 2)
    replicas = [
        Replica(rows=n, ranks=[rank_of(model, layers, device)])
        for n, device in zip(rows, _names(cluster), strict=True)
    ]
    one = Pipeline(
        micro_batches=micro_batches,
        micro_batch_rows=sum(rows),
        stages=[Stage(layers=layers, in_flight=1, replicas=replicas)],
    )
    return _plan("data-parallel", cluster, model, sequence_length, one)


def pipeline(
    cluster: Cluster, model: Model, sequence_length: int, cuts: Sequence[int], rows: int, micro_batches: int
) -> Plan:
    """1F1B: stage i holds layers [cuts[i], cuts[i + 1]) on device i; `rows` of each micro-batch."""
    count = len(cuts) - 1
    stages = [
        Stage(
            layers=(a, b),
            in_flight=min(count - i, micro_batches),
            replicas=[Replica(rows=rows, ranks=[rank_of(model, (a, b), device)])],
        )
        for i, (a, b, device) in enumerate(zip(cuts, cuts[1:], _names(cluster), strict=False))
    ]
    one = Pipeline(micro_batches=micro_batches, micro_batch_rows=rows, stages=stages)
    return _plan("pipeline", cluster, model, sequence_length, one)


def tensor_parallel(
    cluster: Cluster, model: Model, sequence_length: int, rows: int, micro_batches: int = 1
) -> Plan:
    """One group of all devices with equal shares. Raises ValueError where they do not divide."""
    layers, names = (0, model.layers + 2), _names(cluster)
    if any(size % len(names) for size in (model.heads, model.ffn_size, model.vocab_size)):
        raise ValueError(f"{model.name} does not divide by {len(names)}")
    share = (model.heads // len(names), model.ffn_size // len(names), model.vocab_size // len(names))
    group = Replica(rows=rows, ranks=[rank_of(model, layers, device, share) for device in names])
    one = Pipeline(
        micro_batches=micro_batches,
        micro_batch_rows=rows,
        stages=[Stage(layers=layers, in_flight=1, replicas=[group])],
    )
    return _plan("tensor-parallel", cluster, model, sequence_length, one)
