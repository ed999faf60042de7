"""Another engine's step as a program of ours: the same simulator predicts it.

A tensor-parallel group is one device here: its ranks do the same at the same time, their messages share their node's
link fairly and so arrive together, and the profile's times hold for the group. The order, the way of sending and the
ring all-reduce are the engine's (`cost.engines`), prices are `cost.engine_prices`, links are fitted from sends.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

from hethub import catalog
from hethub.cost.compute import ComputeModel, ComputePrice, PricedSegment
from hethub.cost.engine_prices import Coefficients, StagePrice, stage_price
from hethub.cost.engines import EngineRun
from hethub.cost.footprint import rank_parameters, stage_footprint
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.artifact import inter_link_class, intra_link_class
from hethub.cost.profiles.profile import Profile
from hethub.errors import InputError
from hethub.program.actions import Action, Message, Price, Program, Transfer, What
from hethub.program.ownership import Ownership
from hethub.simulate.engine import Simulation, simulate
from hethub.simulate.orders import ORDERS, Step
from hethub.specs.cluster import Cluster, DeviceType, GroupLink, Link, NodeGroup
from hethub.specs.layout import Layout
from hethub.specs.workload import Workload
from hethub.timeline.record import Kind, Lane

__all__ = ["EnginePrediction", "engine_program", "predict_engine_run"]

_SCALAR_BYTES = 16


@dataclass(frozen=True, slots=True)
class EnginePrediction:
    """One predicted step: seconds, the part after the last backward, and bytes at the peak of the fullest rank;
    `substitutes` says what was not measured and what stands in for it."""

    step_seconds: float
    reduce_seconds: float
    peak_bytes: float
    simulation: Simulation
    substitutes: tuple[str, ...]


class _Builder:
    """The lists of all tensor-parallel groups."""

    def __init__(self, run: EngineRun, places: dict[tuple[int, int], int]) -> None:
        self.run = run
        self.places = places  # (stage, replica) -> device number
        self.actions: list[list[Action]] = [[] for _ in places]
        self.transfers: list[Transfer] = []
        self.messages: list[Message] = []
        self.prices: dict[tuple[int, int, Kind, int], Price] = {}
        self.numbers: dict[tuple[object, ...], int] = {}
        self.substitutes: set[str] = set()

    def message(self, what: What, source: int, destination: int, size: float, tag: object) -> int:
        """The number of a message; both ends ask with the same arguments."""
        key = (what, source, destination, tag)
        if key not in self.numbers:
            lane = Lane.ACTIVATIONS if what in (What.ACTIVATION, What.GRADIENT) else Lane.PARAMETERS
            self.transfers.append(
                Transfer(what, source, destination, lane, -1, (0, 0), (0, 0), (), round(size))
            )
            self.messages.append(Message(len(self.transfers) - 1, -1))
            self.numbers[key] = len(self.messages) - 1
        return self.numbers[key]

    def send(self, what: What, source: int, destination: int, size: float, tag: object) -> None:
        """Where messages block, the two ends meet before, and the sender waits until it is taken."""
        meets = self.run.blocks and what in (What.ACTIVATION, What.GRADIENT)
        if meets:
            self.take(What.NORM, destination, source, 0, (what, tag, "ready"))
        number = self.message(what, source, destination, size, tag)
        self.actions[source].append(Action(Kind.SEND, -1, -1, number))
        if meets:
            self.take(What.NORM, destination, source, 0, (what, tag, "done"))

    def take(self, what: What, source: int, destination: int, size: float, tag: object) -> None:
        """The receiving end of `send`."""
        meets = self.run.blocks and what in (What.ACTIVATION, What.GRADIENT)
        if meets:
            self.send(What.NORM, destination, source, 0, (what, tag, "ready"))
        number = self.message(what, source, destination, size, tag)
        self.actions[destination].append(Action(Kind.RECEIVE, -1, -1, number))
        if meets:
            self.send(What.NORM, destination, source, 0, (what, tag, "done"))

    # -- the pipeline ----------------------------------------------------------------------------------------

    def price(self, device: int, stage: int, price: StagePrice) -> None:
        """Gathering a received message is communication inside the action that needs it."""
        self.substitutes |= price.substitutes
        last = len(self.run.stages) - 1
        entries = (
            (Kind.FORWARD, price.forward_seconds, price.gather_seconds if stage else 0.0),
            (Kind.BACKWARD, price.backward_seconds, price.gather_seconds if stage < last else 0.0),
            (Kind.UPDATE, price.update_seconds, 0.0),
        )
        for kind, seconds, gather in entries:
            segments = (PricedSegment((0.0,), gather), PricedSegment((seconds,), 0.0))
            whole = ComputePrice(segments, seconds + gather, (seconds,))
            self.prices[device, stage, kind, -1] = Price(whole, 0)

    def step(self, stage: int, replica: int, step: Step) -> None:
        """One entry of the order of a replica."""
        run, kind, device = self.run, step.kind, self.places[stage, replica]
        if isinstance(kind, Kind):
            self.actions[device].append(Action(kind, stage, step.micro_batch, -1))
            return
        what, away = kind
        forward = (what == What.ACTIVATION) == away
        peer = self.places[stage + (1 if forward else -1), replica]
        size = run.message_bytes * (1 if run.engine.slices else run.tensor_parallel)
        if away:
            self.send(what, device, peer, size, step.micro_batch)
        else:
            self.take(what, peer, device, size, step.micro_batch)

    # -- after it --------------------------------------------------------------------------------------------

    def barrier(self) -> None:
        """Everyone tells the first device, which tells everyone."""
        others = range(1, len(self.actions))
        for device in others:
            self.send(What.NORM, device, 0, _SCALAR_BYTES, "barrier")
        for device in others:
            self.take(What.NORM, device, 0, _SCALAR_BYTES, "barrier")
        for device in others:
            self.send(What.TOTAL, 0, device, _SCALAR_BYTES, "barrier")
            self.take(What.TOTAL, 0, device, _SCALAR_BYTES, "barrier")

    def all_reduce(self, stage: int, elements: int) -> None:
        """A ring over the replicas: 2 (n - 1) steps that pass a part on (Patarasuk and Yuan, 2009). Each rank has a
        ring of its own; those of a group share its node's link."""
        count = len(self.run.stages[stage].replicas)
        if count < 2:
            return
        size = elements * self.run.tensor_parallel * self.run.engine.gradient_bytes / count
        ring = [self.places[stage, replica] for replica in range(count)]
        for turn in range(2 * (count - 1)):
            for place, device in enumerate(ring):
                self.send(What.REDUCE, device, ring[(place + 1) % count], size, turn)
            for place, device in enumerate(ring):
                self.take(What.REDUCE, ring[place - 1], device, size, turn)

    def build(self) -> Program:
        return Program(
            layout=Layout(self.run.model, ()),
            ownership=Ownership((), ()),
            devices=tuple(tuple(actions) for actions in self.actions),
            transfers=tuple(self.transfers),
            messages=tuple(self.messages),
            groups={},
            parts={},
            buckets={},
            prices=self.prices,
            inbound={},
            outbound={},
            order={},
            depth={},
            training=True,
        )


def engine_program(
    run: EngineRun, profile: Profile, coefficients: Coefficients, *, strict: bool = False
) -> tuple[Program, ComputeModel, tuple[str, ...]]:
    """The step's lists, the cluster that it runs on, a node for each replica, and what stands in for missing profiles.

    Raises InputError where the profile lacks a layer, a collective or a link.
    """
    cluster, places = _cluster(run, profile)
    builder = _Builder(run, places)
    stages = len(run.stages)
    for number, stage in enumerate(run.stages):
        order = tuple(ORDERS[run.engine.order](stages, number, run.micro_batches))
        for replica, group in enumerate(stage.replicas):
            price = stage_price(run, number, group.device_type, profile, coefficients, strict=strict)
            builder.price(places[number, replica], number, price)
            for step in order:
                builder.step(number, replica, step)
    if run.engine.barrier:
        builder.barrier()
    for number, stage in enumerate(run.stages):
        elements = sum(rank_parameters(run.model, n, run.tensor_parallel) for n in range(*stage.layers))
        builder.all_reduce(number, elements)
        for replica in range(len(stage.replicas)):
            builder.actions[places[number, replica]].append(Action(Kind.UPDATE, number, -1, -1))
    rows = run.micro_batch * run.micro_batches * len(run.stages[0].replicas)
    workload = Workload(
        model=run.model,
        sequence_length=run.sequence_length,
        global_batch=rows,
        precision=run.dtype,
        optimizer="adamw",
    )
    compute = ComputeModel(CostGraph(cluster), workload)
    return builder.build(), compute, tuple(sorted(builder.substitutes))


def predict_engine_run(
    run: EngineRun, profile: Profile, coefficients: Coefficients | None = None, *, strict: bool = False
) -> EnginePrediction:
    """Time and peak memory of one step of another engine. Raises InputError as `stage_price` does, and where the
    profile lacks a link."""
    coefficients = coefficients or Coefficients()
    program, compute, substitutes = engine_program(run, profile, coefficients, strict=strict)
    simulation = simulate(program, compute, sub_events=False)
    assert simulation.timeline is not None  # recorded
    records = simulation.timeline.records
    last_backward = float(records["end"][records["kind"] == Kind.BACKWARD].max())
    peak = max(
        stage_footprint(run, n).allocated_bytes + coefficients.overhead_bytes.get(group.device_type, 0.0)
        for n, stage in enumerate(run.stages)
        for group in stage.replicas
    )
    seconds = simulation.step_seconds
    return EnginePrediction(seconds, seconds - last_backward, peak, simulation, substitutes)


def _cluster(run: EngineRun, profile: Profile) -> tuple[Cluster, dict[tuple[int, int], int]]:
    """A group of nodes for each device type, a node for each replica, links fitted from measured sends."""
    replicas: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for number, stage in enumerate(run.stages):
        for replica, group in enumerate(stage.replicas):
            replicas[group.device_type].append((number, replica))
    degree = run.tensor_parallel
    groups = tuple(
        NodeGroup(
            name=name,
            device_type=name,
            nodes=len(places),
            devices_per_node=1,
            intra_link=_link(profile, (intra_link_class(name),), 1),
            inter_link=_link(profile, (inter_link_class(name, name),), degree),
            zone="default",
        )
        for name, places in replicas.items()
    )
    links = tuple(
        GroupLink(
            between=(one, other),
            link=_link(profile, (inter_link_class(one, other), inter_link_class(other, one)), degree),
            total_bandwidth_bytes_per_second=None,
        )
        for one, other in combinations(replicas, 2)
    )
    cluster = Cluster(
        name=run.name,
        device_types={name: _device_type(name) for name in replicas},
        node_groups=groups,
        links=links,
    )
    ordered = [place for places in replicas.values() for place in places]
    return cluster, {place: number for number, place in enumerate(ordered)}


def _link(profile: Profile, names: tuple[str, ...], pairs: int) -> Link:
    """The slowest of the measured directions; a direction without measurements is left out."""
    fits = [fit for name in names if (fit := profile.link(name, pairs)) is not None]
    if not fits:
        raise InputError(f"the profile has no sends over {' or '.join(names)}. Measure them.")
    fit = min(fits, key=lambda fit: fit.bandwidth_bytes_per_second)
    return Link(
        name=names[0].replace("/", "-"),
        bandwidth_bytes_per_second=fit.bandwidth_bytes_per_second,
        latency_seconds=fit.latency_seconds,
        transport="native",
    )


def _device_type(name: str) -> DeviceType:
    """What the catalog knows; prices come from profiles, so no achievable share is needed."""
    try:
        known = catalog.device(name)
    except catalog.UnknownName as error:
        raise InputError(f"device type {name}: {error}") from None
    return DeviceType(
        name=known.name,
        catalog=known.name,
        vendor=known.vendor,
        memory_bytes=round(known.memory_gib * 2**30),
        memory_reserve_bytes=0,
        memory_bandwidth_bytes_per_second=(known.memory_bandwidth_gb_s or 0.0) * 1e9,
        peak_flops_per_second={dtype: peak * 1e12 for dtype, peak in known.peak_tflops.items()},
        matmul_efficiency=1.0,
        memory_efficiency=1.0,
        substitute_dtype={},
        power_watts=known.power_watts,
        usd_per_hour=known.usd_per_hour,
    )
