"""Small runs of other engines and a profile for them, all made up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from hethub.cost.engines import DEEPSPEED, Engine, EngineRun, ReplicaGroup, RunStage
from hethub.cost.profiles.artifact import inter_link_class, intra_link_class
from hethub.cost.profiles.profile import LayerRow, Profile, TransferRow
from hethub.simulate.imported_runs import opt_model

DEVICE = "TITAN-RTX"
FORWARD, BACKWARD = 0.010, 0.020  # seconds of a layer and row
BANDWIDTH = 1e9
GATHER = 0.001


def small_profile() -> Profile:
    """Every layer alike, in proportion to its rows; the embedding's backward not timed."""
    layers = tuple(
        LayerRow(
            model="OPT-350M",
            device_type=DEVICE,
            layer_kind=kind,
            tensor_parallel=degree,
            micro_batch=rows,
            sequence_length=2048,
            dtype="fp32",
            forward_seconds=FORWARD * rows,
            backward_seconds=None if kind == "embedding" else BACKWARD * rows,
            update_seconds=0.001,
        )
        for kind in ("embedding", "decoder", "head")
        for degree in (1, 2)
        for rows in (1, 2)
    )
    sends = tuple(
        TransferRow(
            operation="send", link_class=name, group_size=1, message_bytes=size, time_seconds=size / BANDWIDTH
        )
        for name in (intra_link_class(DEVICE), inter_link_class(DEVICE, DEVICE))
        for size in (2.0**20, 2.0**28)
    )
    gather = TransferRow(
        operation="all_gather",
        link_class=intra_link_class(DEVICE),
        group_size=2,
        message_bytes=2.0**20,
        time_seconds=GATHER,
    )
    return Profile(layers, (*sends, gather))


def small_run(
    stages: int = 2, *, replicas: int = 1, micro_batches: int = 4, degree: int = 1, engine: Engine = DEEPSPEED
) -> EngineRun:
    """24 decoders over `stages` stages, as even as they go."""
    cuts = [round(26 * n / stages) for n in range(stages + 1)]
    groups = (ReplicaGroup(DEVICE),) * replicas
    return EngineRun(
        name="small",
        engine=engine,
        model=replace(opt_model(degree), name="OPT-350M"),
        sequence_length=2048,
        dtype="fp32",
        tensor_parallel=degree,
        micro_batch=1,
        micro_batches=micro_batches,
        stages=tuple(RunStage((a, b), groups) for a, b in pairwise(cuts)),
    )
