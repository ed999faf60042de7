"""A plan unrolled: which device holds which layers, rows and shares. Ranges and repeats are gone here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from hethub.specs.devices import parse_devices
from hethub.specs.plan import Pipeline, Plan, Rank
from hethub.specs.workload import Model

__all__ = [
    "Layout",
    "PipelinePlace",
    "RankPlace",
    "ReplicaPlace",
    "Share",
    "Span",
    "StagePlace",
    "lay_out",
    "sequence_span",
]

Span = tuple[int, int]  # half-open [start, stop)


def sequence_span(length: int, members: int, member: int) -> Span:
    """Tokens of every row that member `member` of a tensor-parallel group holds between blocks.

    Equal shards of ceil(length / members), as the vendor libraries' collectives want them; the last ones are shorter or
    empty.
    """
    shard = -(-length // members)
    return (min(length, member * shard), min(length, (member + 1) * shard))


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a layer cut by tensor parallelism: half-open spans of query heads, key-value
    heads, FFN columns and vocabulary rows."""

    heads: Span
    kv: Span
    ffn: Span
    vocab: Span

    @classmethod
    def whole(cls, model: Model) -> Share:
        """The share of a group of one."""
        return cls((0, model.heads), (0, model.kv_heads), (0, model.ffn_size), (0, model.vocab_size))


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank. `device` indexes `Cluster.devices()`."""

    device: int
    share: Share


@dataclass(frozen=True, slots=True)
class ReplicaPlace:
    """A tensor-parallel group; `rows` is its span inside every micro-batch."""

    rows: Span
    ranks: tuple[RankPlace, ...]


@dataclass(frozen=True, slots=True)
class StagePlace:
    """`layers` half-open; `index` counts stages within the pipeline."""

    index: int
    layers: Span
    recompute: str
    in_flight: int
    replicas: tuple[ReplicaPlace, ...]

    def devices(self) -> Iterator[int]:
        """Device indices, replica by replica."""
        for replica in self.replicas:
            for rank in replica.ranks:
                yield rank.device


@dataclass(frozen=True, slots=True)
class PipelinePlace:
    """One model replica. Its micro-batch m takes rows [first_row + m * rows, first_row + (m + 1) * rows)."""

    index: int
    schedule: str
    micro_batches: int
    micro_batch_rows: int
    first_row: int
    stages: tuple[StagePlace, ...]


@dataclass(frozen=True)
class Layout:
    """All pipelines, unrolled; device numbers index `Cluster.devices()`."""

    model: Model
    pipelines: tuple[PipelinePlace, ...]

    @cached_property
    def used(self) -> tuple[int, ...]:
        """Devices that hold anything, ascending."""
        return tuple(sorted({d for p in self.pipelines for s in p.stages for d in s.devices()}))


def _device_names(rank: Rank) -> list[str]:
    return [rank.device] if rank.device is not None else parse_devices(rank.devices or "")


def _shares(ranks: list[Rank], model: Model) -> list[Share]:
    """Consecutive spans in file order, `count` alike ones for an entry."""
    group = model.heads // model.kv_heads
    shares = []
    head = ffn = vocab = 0
    for rank in ranks:
        for _ in range(rank.count):
            heads = (head, head + rank.heads)
            shares.append(
                Share(
                    heads=heads,
                    kv=(heads[0] // group, heads[1] // group),
                    ffn=(ffn, ffn + rank.ffn),
                    vocab=(vocab, vocab + rank.vocab),
                )
            )
            head, ffn, vocab = head + rank.heads, ffn + rank.ffn, vocab + rank.vocab
    return shares


def _unroll(pipeline: Pipeline, model: Model, index_of: dict[str, int]) -> Iterator[tuple[StagePlace, ...]]:
    """The stages of each of the pipeline's `repeat` copies."""
    columns = []  # per stage, per replica entry: (entry, shares, devices of each rank entry)
    for stage in pipeline.stages:
        columns.append(
            [
                (r, _shares(r.ranks, model), [[index_of[n] for n in _device_names(k)] for k in r.ranks])
                for r in stage.replicas
            ]
        )
    for copy in range(pipeline.repeat):
        stages = []
        for number, (stage, entries) in enumerate(zip(pipeline.stages, columns, strict=True)):
            replicas = []
            row = 0
            for entry, shares, devices in entries:
                for turn in range(entry.repeat):
                    place = copy * entry.repeat + turn
                    chosen = [
                        d
                        for rank, names in zip(entry.ranks, devices, strict=True)
                        for d in names[place * rank.count : (place + 1) * rank.count]
                    ]
                    ranks = tuple(RankPlace(d, s) for d, s in zip(chosen, shares, strict=True))
                    replicas.append(ReplicaPlace((row, row + entry.rows), ranks))
                    row += entry.rows
            layers = (stage.layers[0], stage.layers[1])
            stages.append(StagePlace(number, layers, stage.recompute, stage.in_flight, tuple(replicas)))
        yield tuple(stages)


def lay_out(plan: Plan) -> Layout:
    """Unroll a plan that `check_plan` accepts (others may raise KeyError or ValueError)."""
    index_of = {device.name: i for i, device in enumerate(plan.cluster.devices())}
    places: list[PipelinePlace] = []
    row = 0
    for pipeline in plan.pipelines:
        for stages in _unroll(pipeline, plan.workload.model, index_of):
            places.append(
                PipelinePlace(
                    len(places),
                    pipeline.schedule,
                    pipeline.micro_batches,
                    pipeline.micro_batch_rows,
                    row,
                    stages,
                )
            )
            row += pipeline.micro_batches * pipeline.micro_batch_rows
    return Layout(plan.workload.model, tuple(places))
