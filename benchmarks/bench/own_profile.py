"""Workers under quotas measure themselves: layers, memory traffic, messages; and the machine's pace meanwhile."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from scipy.optimize import nnls

from hethub.cost.profiles.curve import Curve, LinkFit, fit_link
from hethub.cost.profiles.profile import LayerRow, Profile, TransferRow, host_class
from hethub.launch.link_profiler import Exchange, measure_exchanges
from hethub.launch.profiler import LayerProfiler, copy_bytes_per_second
from hethub.specs.cluster import Cluster

from .crew import Crew
from .plans import cpu_cluster, llama_model
from .quota import Cores, CpuQuotas

__all__ = [
    "CELLS",
    "CORES",
    "MODEL",
    "SEQUENCE",
    "Cell",
    "Measured",
    "Measurers",
    "Pace",
    "Paces",
    "Window",
    "measuring",
    "profile_of",
    "straight",
]

MODEL = llama_model(hidden=256, layers=6, heads=4)
SEQUENCE = 128
# Less than the two cores together by a third: what else runs on the machine then takes nothing of a quota.
CORES: Cores = (("fast", 0.5, 2), ("middle", 0.25, 1), ("slow", 0.125, 1))
_ROWS = (1, 2, 4, 8, 12)  # as many as a worker can have
_BUDGET_SECONDS = 3.0  # the slowest worker takes a third of a second for all that is timed of a layer
_EXCHANGES = [
    Exchange(operation, 1 << bits)
    for operation in ("send", "send_work", "receive_work")
    for bits in (10, 18, 22)
]
_EXCHANGE_SECONDS = 0.5

_TYPES = {name: share for name, share, _ in CORES}  # what of a core a worker has
_V = TypeVar("_V")


class Cell(NamedTuple):
    """A layer (the embedding, a decoder, the head) and how many rows it is given."""

    layer: int
    rows: int


CELLS = [Cell(layer, rows) for layer in (0, 1, MODEL.layers + 1) for rows in _ROWS]


class _Measurer:
    """One worker's measurement of itself."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._device = torch.device("cpu")

    def layer(self, device_type: str, layer: int, rows: int) -> LayerRow:
        """What the layer takes."""
        profiler = LayerProfiler(MODEL, device_type, SEQUENCE, "fp32", torch.float32, self._device)
        return profiler.measure(layer, rows, _BUDGET_SECONDS)[0]

    def copy(self) -> float:
        """Bytes per second of a copy that no cache holds."""
        return copy_bytes_per_second(self._device, _BUDGET_SECONDS)


class Pace:
    """Takes the CPU time of the same small work again and again, from when it is made."""

    _EACH_SECONDS = 0.1
    _PRODUCTS = 20

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._taken: list[tuple[float, float]] = []
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        matrix = torch.randn(256, 256)
        while True:
            at, begin = time.monotonic(), time.thread_time()
            for _ in range(self._PRODUCTS):
                matrix @ matrix
            self._taken.append((at, time.thread_time() - begin))
            time.sleep(self._EACH_SECONDS)

    def taken(self) -> list[tuple[float, float]]:
        """(Monotonic seconds, CPU seconds of the work) so far."""
        return list(self._taken)


Window = tuple[float, float]  # monotonic seconds


class Paces:
    """How much longer work took within some time than on the whole."""

    def __init__(self, taken: Sequence[tuple[float, float]]) -> None:
        self._at, self._seconds = np.array(taken).T
        self._usual = float(self._seconds.mean())

    def within(self, window: Window) -> float:
        """The mean within the window over the mean of all."""
        inside = (self._at >= window[0]) & (self._at <= window[1])
        return float(self._seconds[inside].mean()) / self._usual if inside.any() else 1.0


@dataclass(frozen=True)
class Measured:
    """Layers that all workers measured at once, of the first worker of each type; and when."""

    cell: Cell
    rows: tuple[LayerRow, ...]
    window: Window

    def paced(self, paces: Paces) -> Measured:
        """At the usual pace."""
        return replace(self, rows=tuple(_times(row, 1 / paces.within(self.window)) for row in self.rows))


_SECONDS = [f.name for f in fields(LayerRow) if f.name.endswith("_seconds")]


def _times(row: LayerRow, factor: float) -> LayerRow:
    """With all its times that much longer."""
    known = {name: getattr(row, name) for name in _SECONDS}
    return replace(row, **{name: factor * value for name, value in known.items() if value is not None})


def _mean(many: Sequence[LayerRow]) -> LayerRow:
    """The same measured several times: with the mean of every time."""
    found = {name: [getattr(one, name) for one in many] for name in _SECONDS}
    return replace(many[0], **{n: statistics.fmean(v) for n, v in found.items() if None not in v})


def straight(profile: Profile) -> Profile:
    """Every time of a layer on a straight line in the rows: a part for each call, one for each row, none negative, by
    least squares of relative errors. What single measurements have of the machine's wander then spreads over all."""
    groups: dict[tuple[str, str], list[LayerRow]] = defaultdict(list)
    for row in profile.layers:
        groups[row.device_type, row.layer_kind].append(row)
    lines = {
        (*group, name): _line(rows, name)
        for group, rows in groups.items()
        for name in _SECONDS
        if all(getattr(row, name) is not None for row in rows)
    }
    layers = []
    for row in profile.layers:
        fitted = {name: lines.get((row.device_type, row.layer_kind, name)) for name in _SECONDS}
        times = {n: line[0] + line[1] * row.micro_batch for n, line in fitted.items() if line is not None}
        layers.append(replace(row, **times))
    return replace(profile, layers=tuple(layers))


def _line(rows: Sequence[LayerRow], name: str) -> tuple[float, float]:
    """Seconds of a call, and of each row more."""
    counts = np.array([row.micro_batch for row in rows], dtype=float)
    seconds = np.array([getattr(row, name) for row in rows])
    terms = np.stack([np.ones_like(counts), counts], axis=1) / seconds[:, None]
    call, each = nnls(terms, np.ones_like(seconds))[0]
    return float(call), float(each)


class Measurers:
    """Workers that measure themselves, all at once, as all work at once in a run."""

    def __init__(self, crew: Crew, names: Sequence[str]) -> None:
        self._crew, self._names = crew, names

    def layer(self, cell: Cell) -> Measured:
        """A layer with some rows."""
        begin = time.monotonic()
        for process, name in enumerate(self._names):
            self._crew.start_one(process, "layer", name, cell.layer, cell.rows)
        rows = [answer.value for answer in self._crew.finish()]
        return Measured(cell, self._firsts(rows), (begin, time.monotonic()))

    def cluster(self) -> tuple[Cluster, tuple[TransferRow, ...]]:
        """The workers' cluster with what copies and messages reach, and what messages cost the CPUs of their ends.
        These move them, so a link is slower than between whole cores by as much as they are."""
        copies = dict(zip(_TYPES, self._firsts(self._crew.call("copy")), strict=True))
        moved = dict(zip(_EXCHANGES, measure_exchanges(_EXCHANGES, _EXCHANGE_SECONDS), strict=True))
        works = tuple(
            TransferRow(
                operation=exchange.operation,
                link_class=host_class(name),
                group_size=1,
                message_bytes=exchange.message_bytes,
                time_seconds=spread.seconds / share,
            )
            for exchange, spread in moved.items()
            if exchange.operation != "send"
            for name, share in _TYPES.items()
        )
        sends = Curve.through(
            {float(e.message_bytes): s.seconds for e, s in moved.items() if e.operation == "send"}
        )
        link = fit_link(dict(zip(sends.sizes, sends.seconds, strict=True)))
        return _with_reach(cpu_cluster(CORES), copies, link), works

    def _firsts(self, values: Sequence[_V]) -> tuple[_V, ...]:
        """Those of the first worker of each type."""
        return tuple(values[self._names.index(name)] for name in _TYPES)


@contextmanager
def measuring(quotas: CpuQuotas) -> Iterator[Measurers]:
    """Under the quotas of the workers that train, whose threads take CPU time also while nothing is sent: 2 % of the
    slowest quota."""
    names = [name for name, _, count in CORES for _ in range(count)]
    with Crew([_Measurer] * len(names)) as crew:
        quotas.place(crew, range(len(names)))
        yield Measurers(crew, names)


def _with_reach(cluster: Cluster, copies: Mapping[str, float], link: LinkFit) -> Cluster:
    types = {
        name: replace(t, memory_bandwidth_bytes_per_second=copies[name], memory_efficiency=1.0)
        for name, t in cluster.device_types.items()
    }
    groups = []
    for group in cluster.node_groups:
        own = replace(
            group.intra_link,
            bandwidth_bytes_per_second=link.bandwidth_bytes_per_second * _TYPES[group.device_type],
            latency_seconds=link.latency_seconds,
        )
        groups.append(replace(group, intra_link=own, inter_link=own))
    return replace(cluster, device_types=types, node_groups=tuple(groups))


def profile_of(measured: Iterable[Measured], works: Sequence[TransferRow]) -> Profile:
    """Of everything that was measured, whenever: the mean of every time, of a layer on a straight line in the rows."""
    cells: dict[Cell, list[tuple[LayerRow, ...]]] = defaultdict(list)
    for one in measured:
        cells[one.cell].append(one.rows)
    layers = (_mean(many) for rows in cells.values() for many in zip(*rows, strict=True))
    return straight(Profile(tuple(layers), tuple(works)))
