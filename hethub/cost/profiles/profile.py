"""Measured profiles: layer times and memory, collective and point-to-point times (format: docs/cost-model.md)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hethub.cost.profiles.curve import Curve, LinkFit, fit_link
from hethub.cost.profiles.table import Column, read_table, write_table

__all__ = ["LayerKey", "LayerRow", "Profile", "TransferRow", "load_profile", "save_profile"]

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
    micro-batch keeps for the backward, `peak_bytes` the peak of the layer alone.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRow:
    """`operation` (all_reduce, all_gather, reduce_scatter, send) over `link_class` by `group_size` devices.

    `message_bytes` is what each device puts in; of a send it is what each of `group_size` pairs moves at once.
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

    def rows(self, key: LayerKey) -> tuple[LayerRow, ...]:
        """The measured micro-batches of a layer."""
        return tuple(self._by_layer.get(key, ()))

    def seconds(self, key: LayerKey, what: str, micro_batch: float, slow_down: float = 1.0) -> float | None:
        """`what` (forward, backward or update) at a micro-batch, the device's own part `slow_down` times as long (see
        `Curve.slowed`); None where that was never measured."""
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
    """Write both tables into `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "layers.csv", LAYERS, _LAYER_COLUMNS, _rows(profile.layers))
    write_table(folder / "transfers.csv", TRANSFERS, _TRANSFER_COLUMNS, _rows(profile.transfers))


def _rows(rows: Iterable[LayerRow] | Iterable[TransferRow]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]


def _any(rows: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    return rows
