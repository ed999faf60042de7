"""Workers under quotas measure themselves: layers, memory traffic, messages; and the machine's pace meanwhile."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
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
    "CORES",
    "MODEL",
    "SEQUENCE",
    "Measurement",
    "Pace",
    "Paces",
    "Window",
    "mean_of",
    "measure",
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

_T = TypeVar("_T", LayerRow, TransferRow)


class _Measurer:
    """One worker's measurement of itself."""

    def __init__(self, rank: int, count: int, port: int) -> None:
        """Join a group as workers do, whose threads take CPU time while nothing is sent."""
        torch.set_num_threads(1)
        self._device = torch.device("cpu")
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)

    def layer(self, device_type: str, layer: int, rows: int) -> tuple[LayerRow, float]:
        """A layer's row, and the wall seconds that a second of CPU time took meanwhile."""
        profiler = LayerProfiler(MODEL, device_type, SEQUENCE, "fp32", torch.float32, self._device)
        begin, spent = time.perf_counter(), time.process_time()
        row, _ = profiler.measure(layer, rows, _BUDGET_SECONDS)
        return row, (time.perf_counter() - begin) / (time.process_time() - spent)

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
class Measurement:
    """What all workers measured at once, by type (of the first worker of each): a profile and when each layer of it was
    measured, bytes per second of memory traffic, wall seconds of a CPU second; and a link between two workers that have
    a core each."""

    profile: Profile
    windows: tuple[Window, ...]
    bytes_per_second: dict[str, float]
    stretch: dict[str, float]
    link: LinkFit

    def paced(self, paces: Paces) -> Profile:
        """The profile at the usual pace."""
        layers = zip(self.profile.layers, self.windows, strict=True)
        return replace(
            self.profile, layers=tuple(_times(row, 1 / paces.within(window)) for row, window in layers)
        )

    def cluster(self) -> Cluster:
        """The workers' cluster with what they reach. A message is moved by the CPUs of its ends, so a link is slower
        than between whole cores by as much as they are."""
        cluster = cpu_cluster(CORES)
        types = {
            name: replace(
                t, memory_bandwidth_bytes_per_second=self.bytes_per_second[name], memory_efficiency=1.0
            )
            for name, t in cluster.device_types.items()
        }
        groups = []
        for group in cluster.node_groups:
            link = replace(
                group.intra_link,
                bandwidth_bytes_per_second=self.link.bandwidth_bytes_per_second
                / self.stretch[group.device_type],
                latency_seconds=self.link.latency_seconds,
            )
            groups.append(replace(group, intra_link=link, inter_link=link))
        return replace(cluster, device_types=types, node_groups=tuple(groups))


def _mean(many: Sequence[_T], names: Sequence[str]) -> _T:
    """The same of each round: with the mean of these fields, where they were measured."""
    found = {name: [getattr(one, name) for one in many] for name in names}
    return replace(many[0], **{n: statistics.fmean(v) for n, v in found.items() if None not in v})


_SECONDS = [f.name for f in fields(LayerRow) if f.name.endswith("_seconds")]


def _times(row: LayerRow, factor: float) -> LayerRow:
    """With all its times that much longer."""
    known = {name: getattr(row, name) for name in _SECONDS}
    return replace(row, **{name: factor * value for name, value in known.items() if value is not None})


def mean_of(rounds: Sequence[Profile]) -> Profile:
    """The mean of every time over rounds that measured the same."""
    layers = zip(*(one.layers for one in rounds), strict=True)
    works = zip(*(one.transfers for one in rounds), strict=True)
    return Profile(
        tuple(_mean(rows, _SECONDS) for rows in layers),
        tuple(_mean(rows, ["time_seconds"]) for rows in works),
    )


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


def measure(quotas: CpuQuotas) -> Measurement:
    """Layer by layer, all workers at the same and busy until the slowest has it."""
    names = [name for name, _, count in CORES for _ in range(count)]
    rows: list[LayerRow] = []
    windows: list[Window] = []
    stretches: dict[str, list[float]] = defaultdict(list)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    makers = [partial(_Measurer, rank, len(names), store.port) for rank in range(len(names))]
    with Crew(makers) as crew:
        quotas.place(crew, range(len(names)))
        for layer in (0, 1, MODEL.layers + 1):
            for count in _ROWS:
                begin = time.monotonic()
                for process, name in enumerate(names):
                    crew.start_one(process, "layer", name, layer, count)
                answers = dict(
                    zip(reversed(names), reversed(crew.finish()), strict=True)
                )  # of the first of a type
                for name, answer in answers.items():
                    rows.append(answer.value[0])
                    windows.append((begin, time.monotonic()))
                    stretches[name].append(answer.value[1])
        copies = dict(zip(reversed(names), reversed(crew.call("copy")), strict=True))
    stretch = {name: statistics.median(found) for name, found in stretches.items()}
    moved = dict(zip(_EXCHANGES, measure_exchanges(_EXCHANGES, _EXCHANGE_SECONDS), strict=True))
    works = [
        TransferRow(
            operation=exchange.operation,
            link_class=host_class(name),
            group_size=1,
            message_bytes=exchange.message_bytes,
            time_seconds=spread.seconds * stretch[name],
        )
        for exchange, spread in moved.items()
        if exchange.operation != "send"
        for name in stretch
    ]
    sends = Curve.through(
        {float(e.message_bytes): s.seconds for e, s in moved.items() if e.operation == "send"}
    )
    link = fit_link(dict(zip(sends.sizes, sends.seconds, strict=True)))
    return Measurement(Profile(tuple(rows), tuple(works)), tuple(windows), copies, stretch, link)
