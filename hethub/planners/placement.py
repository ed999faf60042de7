"""Candidates in counts become plans on named devices."""

from __future__ import annotations

from collections.abc import Sequence

from hethub.planners.candidate import Candidate, Entry
from hethub.planners.chain import StageDraft
from hethub.planners.pools import Pool, Pools
from hethub.planners.shares import rank_entries
from hethub.specs.cluster import Cluster
from hethub.specs.devices import format_devices
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.specs.workload import Model, Workload

__all__ = ["name_ranks", "place"]

_Group = tuple[int, ...]


class _Free:
    """Devices of a pool that are not in use yet; groups come node by node."""

    def __init__(self, pool: Pool) -> None:
        self.left = [list(node) for node in pool.nodes]

    def take(self, degree: int) -> _Group:
        """The next group inside a node. Raises LookupError when there is none."""
        for node in self.left:
            if len(node) >= degree:
                group = tuple(node[:degree])
                del node[:degree]
                return group
        raise LookupError(f"no node has {degree} devices left")


_Units = dict[int, _Free]


def place(candidate: Candidate, pools: Pools, cluster: Cluster, workload: Workload) -> Plan | None:
    """Give every seat its devices, in device order, the largest groups first; None where the nodes cannot be cut so."""
    used = {
        seat.pool for entry in candidate.entries for stage in entry.chain.stages for seat, _ in stage.seats
    }
    units = {pool: _Free(pools[pool]) for pool in used}
    names = [device.name for device in pools.graph.devices]
    try:
        pipelines = [
            _pipeline(entry, units, candidate, names, workload.model)
            for entry in sorted(candidate.entries, key=_largest, reverse=True)
        ]
    except LookupError:
        return None
    return Plan(name="uneven", pipelines=pipelines, cluster=cluster, workload=workload)


def _largest(entry: Entry) -> int:
    return max(seat.degree for stage in entry.chain.stages for seat, _ in stage.seats)


def _pipeline(entry: Entry, units: _Units, candidate: Candidate, names: list[str], model: Model) -> Pipeline:
    chain = entry.chain
    groups = _groups(entry, units, candidate.stage_major)
    stages = []
    layer = 0
    for number, stage in enumerate(chain.stages):
        start = layer
        layer += stage.decoders + (number == 0) + (number == len(chain.stages) - 1)
        ends = (number == 0, number == len(chain.stages) - 1)
        stages.append(
            Stage(
                layers=(start, layer),
                recompute="full" if stage.full else "none",
                in_flight=min(stage.in_flight, entry.micro_batches),
                replicas=[
                    Replica(
                        rows=rows,
                        repeat=seat.replicas,
                        ranks=name_ranks(
                            groups[number][place],
                            rank_entries(model, seat.degree, stage.decoders > 0, any(ends)),
                            names,
                        ),
                    )
                    for place, (seat, rows) in enumerate(stage.seats)
                ],
            )
        )
    return Pipeline(
        repeat=entry.repeat,
        schedule=candidate.schedule,
        micro_batches=entry.micro_batches,
        micro_batch_rows=chain.rows,
        stages=stages,
    )


def _groups(entry: Entry, units: _Units, stage_major: bool) -> list[list[list[_Group]]]:
    """Groups of each stage and seat, in the plan file's order: pipeline copy by copy, then replica by
    replica."""
    stages = entry.chain.stages
    groups: list[list[list[_Group]]] = [[[] for _ in stage.seats] for stage in stages]
    if stage_major:
        turns = [(number, stage) for number, stage in enumerate(stages) for _ in range(entry.repeat)]
    else:
        turns = [(number, stage) for _ in range(entry.repeat) for number, stage in enumerate(stages)]
    for number, stage in turns:
        _seat(stage, groups[number], units)
    return groups


def _seat(stage: StageDraft, groups: list[list[_Group]], units: _Units) -> None:
    """One pipeline's replicas of one stage."""
    for place, (seat, _) in enumerate(stage.seats):
        groups[place].extend(units[seat.pool].take(seat.degree) for _ in range(seat.replicas))


def name_ranks(
    groups: Sequence[_Group], entries: Sequence[tuple[int, int, int, int]], names: list[str]
) -> list[Rank]:
    """The rank entries of alike groups; `entries` are (count, heads, ffn, vocab)."""
    ranks = []
    start = 0
    for count, heads, ffn, vocab in entries:
        devices = [names[d] for group in groups for d in group[start : start + count]]
        start += count
        if len(devices) == 1:
            ranks.append(Rank(device=devices[0], heads=heads, ffn=ffn, vocab=vocab))
        else:
            text = format_devices(devices)
            ranks.append(Rank(devices=text, count=count, heads=heads, ffn=ffn, vocab=vocab))
    return ranks
