"""Measured profiles: layer times and memory, collective and point-to-point times (format: docs/cost-model.md)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hethub.cost.profiles.curve import Curve, LinkFit, fit_link
from hethub.cost.profiles.table import Column, read_table, write_table
from hethub.files import writing

__all__ = ["LayerKey", "LayerRow", "Profile", "TransferRow", "host_class", "load_profile", "save_profile"]

LAYERS, TRANSFERS = "layers", "transfers"
_LAYER_COLUMNS = (
    *(Column(name, "text", key=True) for name in ("model", "device_type", "layer_kind")),
    *(Column(name, "count", key=True) for name in ("tensor_parallel", "micro_batch", "sequence_length")),
    Column("dtype", "text", key=True),
    Column("forward", "time"),
    Column("backward", "time", optional=True),
    Column("update", "time", optional=True),
    Column("parameters", "count", optional=True),
    Column("kept", "size", optional=True),
    Column("peak", "size", optional=True),
    Column("spread", "ratio", optional=True),
    Column("backward_input", "time", optional=True),
    Column("backward_weight", "time", optional=True),
)
_TRANSFER_COLUMNS = (
    Column("operation", "text", key=True),
    Column("link_class", "text", key=True),
    Column("group_size", "count", key=True),
    Column("message", "size", key=True),
    Column("time", "time"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One layer on one rank: seconds with the collectives inside; None where it was not timed.

    `update_seconds` is the optimizer's share for the layer's `parameters` (elements of the rank); `kept_bytes` what a
    micro-batch keeps for the backward, `peak_bytes` the peak of the layer alone. `spread` is how far the quartiles of
    repetitions are apart, over their median: the larger of forward's and backward's. `backward_input_seconds` and
    `backward_weight_seconds` are the halves of a backward that is split.
    """

    model: str
    device_type: str
    layer_kind: str
    tensor_parallel: int
    micro_batch: int
    sequence_length: int
    dtype: str
    forward_seconds: float
    backward_seconds: float | None = None
    update_seconds: float | None = None
    parameters: int | None = None
    kept_bytes: float | None = None
    peak_bytes: float | None = None
    spread: float | None = None
    backward_input_seconds: float | None = None
    backward_weight_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRow:
    """`operation` (all_reduce, all_gather, reduce_scatter, send) over `link_class` by `group_size` devices.

    `message_bytes` is what each device puts in; of a send it is what each of `group_size` pairs moves at once.
    `send_work` and `receive_work` are what a message takes of a device that is the host's own CPU (`host_class`).
    """

    operation: str
    link_class: str
    group_size: int
    message_bytes: float
    time_seconds: float


@dataclass(frozen=True, slots=True)
class LayerKey:
    """Which layer was measured, but for the micro-batch."""

    model: str
    device_type: str
    layer_kind: str
    tensor_parallel: int
    sequence_length: int
    dtype: str


@dataclass(frozen=True)
class Profile:
    """All rows of a folder. Lookups answer None where nothing was measured: the caller falls back or refuses."""

    layers: tuple[LayerRow, ...]
    transfers: tuple[TransferRow, ...]

    @cached_property
    def _by_layer(self) -> dict[LayerKey, list[LayerRow]]:
        found: dict[LayerKey, list[LayerRow]] = defaultdict(list)
        for row in self.layers:
            found[
                LayerKey(
                    row.model,
                    row.device_type,
                    row.layer_kind,
                    row.tensor_parallel,
                    row.sequence_length,
                    row.dtype,
                )
            ].append(row)
        return found

    @cached_property
    def _curves(self) -> dict[tuple[LayerKey, str], Curve | None]:
        return {}

    @cached_property
    def _links(self) -> dict[tuple[str, str], dict[int, dict[float, float]]]:
        found: dict[tuple[str, str], dict[int, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
        for row in self.transfers:
            found[row.operation, row.link_class][row.group_size][row.message_bytes] = row.time_seconds
        return found

    @cached_property
    def micro_batches(self) -> tuple[int, ...]:
        """The rows of a micro-batch at which some layer was measured, ascending."""
        return tuple(sorted({row.micro_batch for row in self.layers}))

    def spread(self, model: str, device_types: Iterable[str]) -> float | None:
        """The largest spread of a model's layers on some device types; None where none was noted."""
        chosen = set(device_types)
        noted = [r.spread for r in self.layers if r.model == model and r.device_type in chosen]
        return max((spread for spread in noted if spread is not None), default=None)

    def rows(self, key: LayerKey) -> tuple[LayerRow, ...]:
        """The measured micro-batches of a layer."""
        return tuple(self._by_layer.get(key, ()))

    def seconds(self, key: LayerKey, what: str, micro_batch: float, slow_down: float = 1.0) -> float | None:
        """`what` (a time of `LayerRow`) at a micro-batch, the device's own part `slow_down` times as long (see
        `Curve.slowed`). Between two measured tensor-parallel degrees it is a power of the degree; None beyond them and
        where nothing was measured."""
        found = self._at_degree(key, what, micro_batch, slow_down)
        if found is not None:
            return found
        degrees = [
            n for n in self._degrees if self._at_degree(replace(key, tensor_parallel=n), what, 1) is not None
        ]
        below = max((n for n in degrees if n < key.tensor_parallel), default=None)
        above = min((n for n in degrees if n > key.tensor_parallel), default=None)
        if below is None or above is None:
            return None
        ends = [
            self._at_degree(replace(key, tensor_parallel=n), what, micro_batch, slow_down) or 0.0
            for n in (below, above)
        ]
        share = math.log(key.tensor_parallel / below) / math.log(above / below)
        return float(ends[0] ** (1 - share) * ends[1] ** share)

    @cached_property
    def _degrees(self) -> tuple[int, ...]:
        return tuple(sorted({row.tensor_parallel for row in self.layers}))

    def _at_degree(
        self, key: LayerKey, what: str, micro_batch: float, slow_down: float = 1.0
    ) -> float | None:
        """The same at a degree that was measured."""
        place = (key, what)
        if place not in self._curves:
            points = {
                float(row.micro_batch): float(value)
                for row in self._by_layer.get(key, ())
                if (value := getattr(row, f"{what}_seconds")) is not None
            }
            self._curves[place] = Curve.through(points) if points else None
        curve = self._curves[place]
        return None if curve is None else curve.slowed(micro_batch, slow_down)

    def transfer_seconds(
        self, operation: str, link_class: str, group_size: int, message_bytes: float
    ) -> float | None:
        """A collective's or send's time; below the smallest measured message it is that one's."""
        points = self._links.get((operation, link_class), {}).get(group_size)
        if not points:
            return None
        return Curve.through(points).at(max(message_bytes, min(points)))

    def link(self, link_class: str, pairs: int) -> LinkFit | None:
        """Latency and bandwidth of `pairs` sends at once, all pairs together; of the nearest measured number."""
        known = self._links.get(("send", link_class))
        if not known:
            return None
        nearest = min(known, key=lambda n: (abs(n - pairs), n))
        return fit_link({size * nearest: seconds for size, seconds in known[nearest].items()})

    def message_work(self, device_type: str) -> tuple[LinkFit, LinkFit] | None:
        """What a message takes of a device that is the host's CPU, sent and received; None where not measured."""
        where = host_class(device_type)
        known = [
            self._links.get((operation, where), {}).get(1) for operation in ("send_work", "receive_work")
        ]
        if None in known:
            return None
        curves = [
            Curve.through(points) for points in known if points is not None
        ]  # without what was disturbed
        sent, received = (fit_link(dict(zip(c.sizes, c.seconds, strict=True))) for c in curves)
        return sent, received


def host_class(device_type: str) -> str:
    """The link class under which stands what messages take of the CPUs of a device type."""
    return f"host/{device_type}"


def load_profile(folder: Path) -> Profile:
    """`layers.csv` and `transfers.csv` of a folder. Raises InputError (see `read_table`)."""
    layers = read_table(folder / "layers.csv", LAYERS, _LAYER_COLUMNS)
    transfers = read_table(folder / "transfers.csv", TRANSFERS, _TRANSFER_COLUMNS)
    as_any: list[dict[str, Any]] = list(layers)
    return Profile(
        tuple(LayerRow(**row) for row in as_any),
        tuple(TransferRow(**row) for row in _any(transfers)),
    )


def save_profile(profile: Profile, folder: Path) -> None:
    """Write both tables into `folder`, which is made where it is missing. Raises InputError where it cannot be."""
    with writing(folder, "Name another folder."):
        folder.mkdir(parents=True, exist_ok=True)
        write_table(folder / "layers.csv", LAYERS, _LAYER_COLUMNS, _rows(profile.layers))
        write_table(folder / "transfers.csv", TRANSFERS, _TRANSFER_COLUMNS, _rows(profile.transfers))


def _rows(rows: Iterable[LayerRow] | Iterable[TransferRow]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]


def _any(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return rows
