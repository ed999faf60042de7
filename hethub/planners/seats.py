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
from hethub.cost.memory import (
    MemoryUse,
    apart_bytes,
    cut_inside_elements,
    layer_bytes,
    on_host,
    rank_shape,
    rank_use,
    usable_bytes,
)
from hethub.cost.shapes import BYTES
from hethub.planners.pools import Pools
from hethub.planners.shares import even_shares
from hethub.specs.layout import PipelinePlace, RankPlace, ReplicaPlace, StagePlace
from hethub.timeline.record import Kind

__all__ = ["Crew", "Ends", "LeastLines", "Seat", "SeatCost", "SeatCosts", "Slot", "crew_size", "crew_slots"]


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


class LeastLines(NamedTuple):
    """The least that memory can ask of a group, however many share its updates, in bytes: `room` for n decoders that
    each take `each`, and `kept` more a micro-batch in flight, beside `own` a micro-batch; with recomputation all but
    one micro-batch in flight take `entry`. The exchange takes `exchanged` a decoder and `own_exchanged`."""

    room: float
    each: float
    kept: float
    own: float
    entry: float
    exchanged: float
    own_exchanged: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatCost:
    """One group with `rows` rows of every micro-batch, on its most loaded rank.

    Seconds are (forward, backward) of one layer, collectives included; `decoder_weight` of that backward are the part
    that nobody waits for. Recomputing a layer takes its forward again, and the head `head_again`, a forward without
    gradients. A stage with n decoders holds
    `ends.elements + n * decoder_elements` parameters and keeps `ends.kept + n * decoder_kept` bytes a
    micro-batch; `decoder_apart` bytes a decoder are shared by those who share its update, where there are several.
    """

    pool: int
    degree: int
    rows: int
    decoder: tuple[float, float]
    decoder_weight: float
    embedding: tuple[float, float]
    head: tuple[float, float]
    head_again: float
    decoder_elements: int
    decoder_kept: int
    decoder_apart: int
    ends: Mapping[tuple[bool, bool], Ends]  # by place: (first stage, last stage)
    usable: int
    width: int  # bytes of a weight
    gradient: int  # bytes of a gradient element
    state: int  # bytes of an owned element's optimizer state
    host: bool  # whether tensors and messages lie in the host's memory
    joint: bool  # whether collectives may carry gradients and weights
    boundary: int  # bytes of a stage's input or output

    def _lasting(self, elements: int, decoders: int, holders: int) -> float:
        """Bytes of weights, gradients and optimizer state, of which `holders` devices share the last."""
        apart = decoders * self.decoder_apart / holders if holders > 1 else 0.0
        leaving = elements * self.width * (1.0 - 1.0 / holders) if self.host else 0.0  # new weights
        return elements * (self.width + self.gradient + self.state / holders) + apart + leaving

    def _exchanged(self, elements: int, holders: int) -> float:
        """Bytes of others' gradients of what a device updates; on a host also of what others update, both ways; in a
        collective of all that is shared, and of the own part of the sums."""
        if holders < 2:
            return 0.0
        each = 2 * self.gradient + self.width if self.host else self.gradient
        return elements * each * (1.0 + (1.0 if self.joint else -1.0) / holders)

    def least_lines(self, place: tuple[bool, bool], holders: int) -> LeastLines:
        """For any number of devices up to `holders` that share the update."""
        ends, numbers = self.ends[place], (1, 2, holders)
        return LeastLines(
            room=self.usable - ends.fixed - min(self._lasting(ends.elements, 0, n) for n in numbers),
            each=min(self._lasting(self.decoder_elements, 1, n) for n in numbers),
            kept=self.decoder_kept,
            own=ends.kept,
            entry=ends.entry,
            exchanged=min(self._exchanged(self.decoder_elements, n) for n in numbers),
            own_exchanged=min(self._exchanged(ends.elements, n) for n in numbers),
        )

    def _waiting(self, untold: int) -> int:
        """Bytes of gradients that were sent to a stage before that is `untold` micro-batches further ahead: on a host
        they lie here until it tells that it has them."""
        return untold * self.boundary if self.host else 0

    def _kept(self, place: tuple[bool, bool], decoders: int) -> int:
        """Bytes of a micro-batch in flight; a head alone does not keep its input, so that this lies beside it."""
        alone = self.boundary if decoders == 0 and place == (False, True) else 0
        return self.ends[place].kept + decoders * self.decoder_kept + alone

    def most_decoders(
        self, place: tuple[bool, bool], held: int, holders: int, *, full: bool, untold: int = 0
    ) -> int:
        """How many decoders fit with `held` micro-batches in flight, and `untold` more in the stage before; negative
        when not even the ends do."""
        ends = self.ends[place]
        room = self.usable - ends.fixed - self._lasting(ends.elements, 0, holders)
        each = self._lasting(self.decoder_elements, 1, holders)
        passing = self._waiting(untold)
        if full:
            computing = (room - passing - (held - 1) * ends.entry - ends.kept) // (each + self.decoder_kept)
        else:
            computing = (room - passing - held * ends.kept) // (each + held * self.decoder_kept)
        room -= ends.kept + self._exchanged(ends.elements, holders)
        each += self.decoder_kept + self._exchanged(self.decoder_elements, holders)
        most = int(min(computing, room // each))
        if most == 0 and self.bytes(place, 0, held, holders, full=full, untold=untold) > self.usable:
            return -1
        return most

    def most_in_flight(
        self, place: tuple[bool, bool], decoders: int, holders: int, *, full: bool, untold: int = 0
    ) -> int:
        """How many micro-batches fit with `decoders` decoders that fit as such, and `untold` more in the stage
        before."""
        ends = self.ends[place]
        elements = ends.elements + decoders * self.decoder_elements
        kept = self._kept(place, decoders)
        room = self.usable - ends.fixed - self._lasting(elements, decoders, holders) - self._waiting(untold)
        return int(1 + (room - kept) // ends.entry) if full else int(room // kept)

    def bytes(
        self, place: tuple[bool, bool], decoders: int, held: int, holders: int, *, full: bool, untold: int = 0
    ) -> float:
        """Peak bytes of the most loaded rank, as `cost.memory` counts them, updates shared evenly, where the stage
        before has `untold` more micro-batches in flight."""
        ends = self.ends[place]
        elements = ends.elements + decoders * self.decoder_elements
        kept = self._kept(place, decoders)
        activations = ((held - 1) * ends.entry + kept if full else held * kept) + self._waiting(untold)
        lasting = self._lasting(elements, decoders, holders) + ends.fixed
        return lasting + max(activations, kept + self._exchanged(elements, holders))


class _LazyEnds(dict[tuple[bool, bool], Ends]):
    """A stage of `cost.memory` less its decoders; measured when asked for, since most stages have no end."""

    def __init__(self, compute: ComputeModel, replica: ReplicaPlace) -> None:
        super().__init__()
        self._compute = compute
        self._replica = replica

    def __missing__(self, place: tuple[bool, bool]) -> Ends:
        compute, workload, replica = self._compute, self._compute.workload, self._replica
        top, rank, shape = workload.model.layers + 2, replica.ranks[0], rank_shape(compute, replica, 0)
        # A stage with both ends holds all decoders; others are measured with one.
        layers = {(True, True): (0, top), (True, False): (0, 2), (False, True): (top - 2, top)}.get(
            place, (1, 2)
        )
        decoders = workload.model.layers if all(place) else 1

        def use_of(held: int, recompute: str) -> MemoryUse:
            stage = StagePlace(0, layers, recompute, held, (replica,))
            pipeline = PipelinePlace(0, "1f1b", held, replica.rows[1], 0, (stage,))
            return rank_use(compute, pipeline, stage, rank, shape, 0).use

        use = use_of(1, "none")
        found = self[place] = Ends(
            elements=use.weights // shape.size - decoders * compute.stage_parameters(rank.share, (1, 2)),
            kept=use.activations - decoders * layer_bytes(shape, "decoder").kept,
            entry=use_of(2, "full").activations - use_of(1, "full").activations,
            fixed=use.buffers + use.workspace,
        )
        return found


class SeatCosts:
    """Seat costs of a cluster's pools, kept."""

    def __init__(
        self, compute: ComputeModel, pools: Pools, reserve_bytes: Mapping[str, int] | None = None
    ) -> None:
        self.compute = compute
        self.pools = pools
        self.reserve_bytes = reserve_bytes or {}  # by device type, that the user keeps free
        self._known: dict[tuple[int, int, int], SeatCost] = {}
        self._ends: dict[
            tuple[int, int, int, bool], _LazyEnds
        ] = {}  # bytes are alike on devices of all speeds

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
        replica, host = ReplicaPlace((0, rows), ranks), on_host(compute, devices[0])
        shape = rank_shape(compute, replica, 0)
        ends = self._ends.setdefault((degree, rows, shape.size, host), _LazyEnds(compute, replica))
        # Bytes are those of the first rank: it has the most of everything.
        return SeatCost(
            pool=pool,
            degree=degree,
            rows=rows,
            decoder=seconds(1),
            decoder_weight=compute.group_price(ranks, (1, 2), rows, Kind.BACKWARD_WEIGHT).seconds,
            embedding=seconds(0),
            head=seconds(model.layers + 1),
            head_again=compute.group_price(
                ranks, (model.layers + 1, model.layers + 2), rows, Kind.FORWARD, training=False
            ).seconds,
            decoder_elements=compute.stage_parameters(shares[0], (1, 2)),
            decoder_kept=layer_bytes(shape, "decoder").kept,
            decoder_apart=cut_inside_elements(shape, (1, 2)) * apart_bytes(workload, width),
            ends=ends,
            usable=usable_bytes(device_type) - self.reserve_bytes.get(self.pools[pool].known_name, 0),
            width=width,
            gradient=gradient_bytes(workload.precision),
            state=state_bytes(workload.precision),
            host=host,
            joint=compute.graph.has_collectives(devices[0]),
            boundary=rows * workload.sequence_length * model.hidden_size * width,
        )
