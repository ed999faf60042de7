"""What passes between the stages of a pipeline for each micro-batch, and how long that takes by prediction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from hethub.cost.compute import ComputeModel
from hethub.cost.shapes import BYTES
from hethub.specs.layout import Layout, RankPlace, Span, StagePlace, sequence_span

__all__ = ["Rectangle", "hop_seconds", "rectangles"]


class Rectangle(NamedTuple):
    """Rows and tokens of a micro-batch that `giver` holds and `taker` is to have."""

    giver: RankPlace
    taker: RankPlace
    rows: Span
    tokens: Span
    size_bytes: int


def rectangles(compute: ComputeModel, sender: StagePlace, receiver: StagePlace) -> Iterator[Rectangle]:
    """Every rank of the receiver gets the rows and tokens that it holds between blocks, each once, from the rank that
    has them, which may be itself.

    So a byte crosses the link between the stages once; the receiving group's all-gather fans it out."""
    workload, length = compute.workload, compute.workload.sequence_length
    for target in receiver.replicas:
        for source in sender.replicas:
            rows = _overlap(source.rows, target.rows)
            if rows is None:
                continue
            for to, taker in enumerate(target.ranks):
                wanted = sequence_span(length, len(target.ranks), to)
                for at, giver in enumerate(source.ranks):
                    tokens = _overlap(sequence_span(length, len(source.ranks), at), wanted)
                    if tokens is not None:
                        dtype = compute.graph.devices[giver.device].type.dtype_for(workload.precision)
                        elements = (rows[1] - rows[0]) * (tokens[1] - tokens[0]) * workload.model.hidden_size
                        yield Rectangle(giver, taker, rows, tokens, elements * BYTES[dtype])


def _overlap(one: Span, other: Span) -> Span | None:
    start, stop = max(one[0], other[0]), min(one[1], other[1])
    return (start, stop) if start < stop else None


class _Load(NamedTuple):
    """All messages of a micro-batch between two stages: the longest latency, and how long each cell carries them."""

    latency_seconds: float
    cell_seconds: Mapping[int, float]


def _load(compute: ComputeModel, sender: StagePlace, receiver: StagePlace) -> _Load:
    latency, cells = 0.0, defaultdict[int, float](float)
    for giver, taker, _, _, size in rectangles(compute, sender, receiver):
        if giver.device != taker.device:
            path = compute.graph.path(giver.device, taker.device)
            latency = max(latency, path.latency_seconds)
            for cell, bandwidth in path.cells:
                cells[cell] += size / bandwidth
    return _Load(latency, cells)


def hop_seconds(layout: Layout, compute: ComputeModel) -> list[tuple[float, ...]]:
    """For every pipeline, seconds from each stage to the next.

    Alike pipelines do the same at the same time, so that their messages over a link meet: shared fairly they all end
    when the last one does, one after the other a message waits for half of the others. Unlike ones meet as often as
    the one has micro-batches for each of the other's."""
    found = [
        [_load(compute, one, other) for one, other in pairwise(pipeline.stages)]
        for pipeline in layout.pipelines
    ]
    # in the step, of all pipelines, by the number of the stage that sends, and the cell
    together = defaultdict[tuple[int, int], float](float)
    counts = [pipeline.micro_batches for pipeline in layout.pipelines]
    for loads, count in zip(found, counts, strict=True):
        for stage, load in enumerate(loads):
            for cell, own in load.cell_seconds.items():
                together[stage, cell] += count * own
    share = 1.0 if compute.graph.shares_links else 0.5

    def seconds(stage: int, load: _Load, count: int) -> float:
        cells = load.cell_seconds.items()
        busy = [own + share * (together[stage, cell] / count - own) for cell, own in cells]
        return load.latency_seconds + max(busy, default=0.0)

    return [
        tuple(seconds(stage, load, count) for stage, load in enumerate(loads))
        for loads, count in zip(found, counts, strict=True)
    ]
