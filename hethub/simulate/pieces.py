"""The smallest whole piece of work that a split could give to, or take from, each device."""

from __future__ import annotations

from hethub.cost.compute import ComputeModel
from hethub.specs.layout import Layout, PipelinePlace, ReplicaPlace, StagePlace
from hethub.timeline.record import Kind

__all__ = ["piece_seconds"]


def piece_seconds(layout: Layout, compute: ComputeModel) -> list[float]:
    """Seconds of a step that one layer, row or micro-batch more would take each device, whichever is least and the plan
    has more than one place for; 0 for a device without work. By device."""
    found = [0.0] * len(compute.graph.devices)
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                seconds = _piece(compute, layout, pipeline, stage, replica)
                for rank in replica.ranks:
                    found[rank.device] = min(found[rank.device] or seconds, seconds)
    return found


def _piece(
    compute: ComputeModel, layout: Layout, pipeline: PipelinePlace, stage: StagePlace, replica: ReplicaPlace
) -> float:
    rows = replica.rows[1] - replica.rows[0]
    each = sum(
        compute.group_price(replica.ranks, stage.layers, rows, kind, recompute=stage.recompute).seconds
        for kind in (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD)
    )
    whole = each * pipeline.micro_batches
    pieces = [whole]
    if len(pipeline.stages) > 1:
        pieces.append(whole / (stage.layers[1] - stage.layers[0]))
    if len(stage.replicas) > 1:
        pieces.append(whole / rows)
    if len(layout.pipelines) > 1:
        pieces.append(each)
    return min(pieces)
