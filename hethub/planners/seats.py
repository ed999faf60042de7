"""What one tensor-parallel group costs: seconds and bytes as straight lines in its number of decoders.

The lines come from the cost model itself (`ComputeModel.group_price`, `cost.memory`), a group of a pool standing for
all of the pool's, so that a search over thousands of splits evaluates them with a few additions each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from hethub.cost.compute import ComputeModel, gradient_bytes, state_bytes
from hethub.cost.memory import activation_bytes, device_memory, usable_bytes
from hethub.cost.shapes import BYTES
from hethub.planners.pools import Pools
from hethub.planners.shares import even_shares
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, ReplicaPlace, StagePlace

__all__ = ["Crew", "Ends", "Seat", "SeatCost", "SeatCosts", "Slot", "crew_size", "crew_slots"]


class Seat(NamedTuple):
    """`count` replicas of a stage, each a group of `degree` devices of pool number `pool`."""

    pool: int
    degree: int
    count: int


Slot = tuple[Seat, ...]  # a stage without its layers
Crew = tuple[tuple[Slot, int], ...]  # a pipeline without its layers: slots, each with how many follow each other


def crew_size(crew: Crew) -> int:
    """How many stages."""
    return sum(count for _, count in crew)


def crew_slots(crew: Crew) -> list[Slot]:
    """The slot of every stage."""
    return [slot for slot, count in crew for _ in range(count)]


class Ends(NamedTuple):
    """Bytes of a stage with these ends and no decoder: parameter elements, bytes kept for each micro-batch in flight
    (or once, with recomputation), bytes kept of each one that will be recomputed, and bytes needed once."""

    elements: int
    kept: int
    entry: int
    fixed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatCost:
    """One group with `rows` rows of every micro-batch, on its most loaded rank.

    Seconds are (forward, backward) of one layer, collectives included. A stage with n decoders holds
    `ends.elements + n * decoder_elements` parameters and keeps `ends.kept + n * decoder_kept` bytes a micro-batch.
    """

    pool: int
    degree: int
    rows: int
    decoder: tuple[float, float]
    embedding: tuple[float, float]
    head: tuple[float, float]
    decoder_elements: int
    decoder_kept: int
    ends: Mapping[tuple[bool, bool], Ends]  # by (first stage, last stage)
    usable: int
    width: int  # bytes of a weight
    gradient: int  # bytes of a gradient element
    state: int  # bytes of an owned element's optimizer state
    boundary: int  # bytes of a stage's input or output

    def element_bytes(self, holders: int) -> float:
        """Bytes of a parameter element whose update `holders` devices share."""
        return self.width + self.gradient + self.state / holders

    def most_decoders(self, first: bool, last: bool, held: int, holders: int, full: bool) -> int:
        """How many decoders fit with `held` micro-batches in flight; negative when not even the ends do."""
        ends = self.ends[first, last]
        each = self.element_bytes(holders)
        room = self.usable - ends.fixed - ends.elements * each
        if full:
            room -= held * ends.entry + ends.kept
            per_decoder = self.decoder_elements * each + self.decoder_kept
        else:
            room -= held * ends.kept
            per_decoder = self.decoder_elements * each + held * self.decoder_kept
        return int(room // per_decoder)

    def most_in_flight(self, first: bool, last: bool, decoders: int, holders: int, full: bool) -> int:
        """How many micro-batches fit with `decoders` decoders."""
        ends = self.ends[first, last]
        elements = ends.elements + decoders * self.decoder_elements
        kept = ends.kept + decoders * self.decoder_kept
        room = self.usable - ends.fixed - elements * self.element_bytes(holders)
        if full:
            return int((room - kept) // ends.entry) if ends.entry else 1 << 30
        return int(room // kept)

    def bytes(self, first: bool, last: bool, decoders: int, held: int, holders: int, full: bool) -> float:
        """Peak bytes of the most loaded rank, as `cost.memory` counts them, updates shared evenly."""
        ends = self.ends[first, last]
        elements = ends.elements + decoders * self.decoder_elements
        kept = ends.kept + decoders * self.decoder_kept
        activations = held * ends.entry + kept if full else held * kept
        return elements * self.element_bytes(holders) + activations + ends.fixed


class _LazyEnds(dict[tuple[bool, bool], Ends]):
    """Measured when asked for: most stages have no end."""

    def __init__(self, measure: Callable[[bool, bool], Ends]) -> None:
        super().__init__()
        self._measure = measure

    def __missing__(self, key: tuple[bool, bool]) -> Ends:
        found = self[key] = self._measure(*key)
        return found


class SeatCosts:
    """Seat costs of a cluster's pools, kept."""

    def __init__(self, compute: ComputeModel, pools: Pools) -> None:
        self.compute = compute
        self.pools = pools
        self._known: dict[tuple[int, int, int], SeatCost] = {}

    def cost(self, pool: int, degree: int, rows: int) -> SeatCost:
        """The cost of a group of `degree` devices of the pool with `rows` rows; the pool must hold such a group."""
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
                compute.group_price(ranks, at, rows, backward=False).seconds,
                compute.group_price(ranks, at, rows, backward=True).seconds,
            )

        device_type = self.pools[pool].type
        width = BYTES[device_type.dtype_for(workload.precision)]
        # The first rank has the most of everything, and it alone counts the copies' gradients.
        kept = activation_bytes(workload, shares[0], 1, rows, width)
        boundary = rows * workload.sequence_length * model.hidden_size * width
        elements = compute.stage_parameters(shares[0], (1, 2))
        return SeatCost(
            pool=pool,
            degree=degree,
            rows=rows,
            decoder=seconds(1),
            embedding=seconds(0),
            head=seconds(model.layers + 1),
            decoder_elements=elements,
            decoder_kept=kept,
            ends=_LazyEnds(partial(self._ends, ranks[0], rows, elements, kept, boundary, width)),
            usable=usable_bytes(device_type),
            width=width,
            gradient=gradient_bytes(workload.precision),
            state=state_bytes(workload.precision),
            boundary=boundary,
        )

    def _ends(
        self,
        rank: RankPlace,
        rows: int,
        elements: int,
        kept: int,
        boundary: int,
        width: int,
        first: bool,
        last: bool,
    ) -> Ends:
        """Measure a stage of `cost.memory` and take its decoders off."""
        workload = self.compute.workload
        top = workload.model.layers + 2
        # A stage with both ends holds all decoders; others are measured with one.
        layers = (0, top) if first and last else (0, 2) if first else (top - 2, top) if last else (1, 2)
        decoders = workload.model.layers if first and last else 1
        stage = StagePlace(0, layers, "none", 1, (ReplicaPlace((0, rows), (rank,)),))
        layout = Layout(workload.model, (PipelinePlace(0, "1f1b", 1, rows, 0, (stage,)),))
        use = device_memory(self.compute, layout, {})[rank.device]
        return Ends(
            elements=use.weights // width - decoders * elements,
            kept=use.activations - decoders * kept,
            entry=rows * workload.sequence_length * 8 if first else boundary,
            fixed=use.buffers + use.workspace,
        )
