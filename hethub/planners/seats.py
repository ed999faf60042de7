"""What one tensor-parallel group costs: seconds and bytes as straight lines in its number of decoders.

The lines come from the cost model itself (`ComputeModel.group_price`, `cost.memory`), a group of a pool
standing for all of the pool's, so that a search over thousands of splits evaluates them with a few
additions each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hethub.cost.compute import ComputeModel, gradient_bytes, state_bytes
from hethub.cost.memory import activation_bytes, device_memory, usable_bytes
from hethub.cost.shapes import BYTES
from hethub.planners.pools import Pools
from hethub.planners.shares import even_shares
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, ReplicaPlace, StagePlace
from hethub.timeline.record import Kind

__all__ = ["Crew", "Ends", "Seat", "SeatCost", "SeatCosts", "Slot", "crew_size", "crew_slots"]


class Seat(NamedTuple):
    """`replicas` of a stage, each a group of `degree` devices of pool number `pool`."""

    pool: int
    degree: int
    replicas: int


Slot = tuple[Seat, ...]  # a stage without its layers
Crew = tuple[
    tuple[Slot, int], ...
]  # a pipeline without its layers: slots, each with how many follow each other


def crew_size(crew: Crew) -> int:
    """How many stages."""
    return sum(count for _, count in crew)


def crew_slots(crew: Crew) -> list[Slot]:
    """The slot of every stage."""
    return [slot for slot, count in crew for _ in range(count)]


class Ends(NamedTuple):
    """Bytes of a stage with these ends and no decoder: parameter elements, bytes kept for each micro-batch
    in flight (or once, with recomputation), bytes kept of each one that will be recomputed, and bytes
    needed once."""

    elements: int
    kept: int
    entry: int
    fixed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatCost:
    """One group with `rows` rows of every micro-batch, on its most loaded rank.

    Seconds are (forward, backward) of one layer, collectives included; recomputing a layer takes its forward
    again, and the head `head_again`, a forward without gradients. A stage with n decoders holds
    `ends.elements + n * decoder_elements` parameters and keeps `ends.kept + n * decoder_kept` bytes a
    micro-batch.
    """

    pool: int
    degree: int
    rows: int
    decoder: tuple[float, float]
    embedding: tuple[float, float]
    head: tuple[float, float]
    head_again: float
    decoder_elements: int
    decoder_kept: int
    ends: Mapping[tuple[bool, bool], Ends]  # by place: (first stage, last stage)
    usable: int
    width: int  # bytes of a weight
    gradient: int  # bytes of a gradient element
    state: int  # bytes of an owned element's optimizer state
    boundary: int  # bytes of a stage's input or output

    def element_bytes(self, holders: int) -> float:
        """Bytes of a parameter element whose update `holders` devices share."""
        return self.width + self.gradient + self.state / holders

    def reduced_bytes(self, holders: int) -> float:
        """Bytes of a parameter element while gradients are reduced: others' gradients of what a device
        updates."""
        return self.element_bytes(holders) + self.gradient * (1.0 - 1.0 / holders)

    def most_decoders(self, place: tuple[bool, bool], held: int, holders: int, *, full: bool) -> int:
        """How many decoders fit with `held` micro-batches in flight; negative when not even the ends do."""
        ends = self.ends[place]
        each = self.element_bytes(holders)
        room = self.usable - ends.fixed - ends.elements * each
        if full:
            room -= held * ends.entry + ends.kept
            per_decoder = self.decoder_elements * each + self.decoder_kept
        else:
            room -= held * ends.kept
            per_decoder = self.decoder_elements * each + held * self.decoder_kept
        reduced = self.usable / self.reduced_bytes(holders) - ends.elements
        return int(min(room // per_decoder, reduced // self.decoder_elements))

    def most_in_flight(self, place: tuple[bool, bool], decoders: int, holders: int, *, full: bool) -> int:
        """How many micro-batches fit with `decoders` decoders that fit as such."""
        ends = self.ends[place]
        elements = ends.elements + decoders * self.decoder_elements
        kept = ends.kept + decoders * self.decoder_kept
        room = self.usable - ends.fixed - elements * self.element_bytes(holders)
        if full:
            return int((room - kept) // ends.entry) if ends.entry else 1 << 30
        return int(room // kept)

    def bytes(self, place: tuple[bool, bool], decoders: int, held: int, holders: int, *, full: bool) -> float:
        """Peak bytes of the most loaded rank, as `cost.memory` counts them, updates shared evenly."""
        ends = self.ends[place]
        elements = ends.elements + decoders * self.decoder_elements
        kept = ends.kept + decoders * self.decoder_kept
        activations = held * ends.entry + kept if full else held * kept
        computing = elements * self.element_bytes(holders) + activations + ends.fixed
        return max(computing, elements * self.reduced_bytes(holders))


class _LazyEnds(dict[tuple[bool, bool], Ends]):
    """A stage of `cost.memory` less its decoders; measured when asked for, since most stages have no end."""

    def __init__(self, compute: ComputeModel, rank: RankPlace, rows: int) -> None:
        super().__init__()
        self._compute = compute
        self._rank = rank
        self._rows = rows

    def __missing__(self, place: tuple[bool, bool]) -> Ends:
        compute, workload, rank, rows = self._compute, self._compute.workload, self._rank, self._rows
        top = workload.model.layers + 2
        width = BYTES[compute.graph.devices[rank.device].type.dtype_for(workload.precision)]
        # A stage with both ends holds all decoders; others are measured with one.
        layers = {(True, True): (0, top), (True, False): (0, 2), (False, True): (top - 2, top)}.get(
            place, (1, 2)
        )
        decoders = workload.model.layers if all(place) else 1
        stage = StagePlace(0, layers, "none", 1, (ReplicaPlace((0, rows), (rank,)),))
        layout = Layout(workload.model, (PipelinePlace(0, "1f1b", 1, rows, 0, (stage,)),))
        use = device_memory(compute, layout, {})[rank.device]
        tokens = rows * workload.sequence_length
        found = self[place] = Ends(
            elements=use.weights // width - decoders * compute.stage_parameters(rank.share, (1, 2)),
            kept=use.activations - decoders * activation_bytes(workload, rank.share, 1, rows, width),
            entry=tokens * (8 if place[0] else workload.model.hidden_size * width),
            fixed=use.buffers + use.workspace,
        )
        return found


class SeatCosts:
    """Seat costs of a cluster's pools, kept."""

    def __init__(self, compute: ComputeModel, pools: Pools) -> None:
        self.compute = compute
        self.pools = pools
        self._known: dict[tuple[int, int, int], SeatCost] = {}

    def cost(self, pool: int, degree: int, rows: int) -> SeatCost:
        """The cost of a group of `degree` devices of the pool with `rows` rows; the pool must hold such a
        group."""
        key = (pool, degree, rows)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._build(pool, degree, rows)
        return found

    def _build(self, pool: int, degree: int, rows: int) -> SeatCost:
        compute, workload = self.compute, self.compute.workload
        model = workload.model
        devices = next(node for node in self.pools[pool].nodes if len(node) >= degree)[:degree]
        shares = even_shares(model, degree)
        ranks = tuple(RankPlace(d, s) for d, s in zip(devices, shares, strict=True))

        def seconds(layer: int) -> tuple[float, float]:
            at = (layer, layer + 1)
            return (
                compute.group_price(ranks, at, rows, Kind.FORWARD).seconds,
                compute.group_price(ranks, at, rows, Kind.BACKWARD).seconds,
            )

        device_type = self.pools[pool].type
        width = BYTES[device_type.dtype_for(workload.precision)]
        # Bytes are those of the first rank: it has the most of everything.
        return SeatCost(
            pool=pool,
            degree=degree,
            rows=rows,
            decoder=seconds(1),
            embedding=seconds(0),
            head=seconds(model.layers + 1),
            head_again=compute.group_price(
                ranks, (model.layers + 1, model.layers + 2), rows, Kind.FORWARD, training=False
            ).seconds,
            decoder_elements=compute.stage_parameters(shares[0], (1, 2)),
            decoder_kept=activation_bytes(workload, shares[0], 1, rows, width),
            ends=_LazyEnds(compute, ranks[0], rows),
            usable=usable_bytes(device_type),
            width=width,
            gradient=gradient_bytes(workload.precision),
            state=state_bytes(workload.precision),
            boundary=rows * workload.sequence_length * model.hidden_size * width,
        )
