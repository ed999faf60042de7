"""Published figures of devices, links, models and vendors, each with its source.

The tables lie beside this file. They are read when first asked for, and looked up whatever the case of the
name. A blank figure is unknown and stays None.
"""

from __future__ import annotations

import copy
import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hethub.specs.nearest import nearest, unknown_name

__all__ = [
    "DEFAULT_MATMUL_EFFICIENCY",
    "DEFAULT_MEMORY_EFFICIENCY",
    "CatalogDevice",
    "CatalogLink",
    "UnknownName",
    "Vendor",
    "device",
    "devices",
    "link",
    "links",
    "model",
    "models",
    "vendor",
    "vendors",
]

# Achievable shares of the peaks where nobody measured the device: FlagPerf's plain matrix product and copy on
# A100-40GB (259.2 of 312 TFLOP/s bf16, 1328 of 1555 GB/s). Of the few measured devices it is the one whose
# datasheet peaks are undisputed; the others' shares are as much about the quoted peak as about the chip.
DEFAULT_MATMUL_EFFICIENCY = 259.2 / 312
DEFAULT_MEMORY_EFFICIENCY = 1328 / 1555

_FOLDER = Path(__file__).parent

T = TypeVar("T")


class UnknownName(KeyError):  # noqa: N818 - it says what is unknown, a name
    """A name that a table does not hold: `nearest` is the one most like it, or None, `known` are all."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(name)
        self.name = name
        self.known = known
        self.nearest = nearest(name, known)

    def __str__(self) -> str:
        return unknown_name(f'"{self.name}" is not in the catalog', self.name, self.known)

    def __reduce__(self) -> tuple[type[UnknownName], tuple[str, list[str]]]:
        return (type(self), (self.name, self.known))


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogDevice:
    """A device type's published figures; None is unknown.

    `peak_tflops` holds dense matrix products by dtype; `lacks` the 16-bit dtypes that the device does not
    have. Efficiencies are measured shares of the peaks, None where nobody measured.
    """

    name: str
    vendor: str
    memory_gib: float
    memory_bandwidth_gb_s: float | None
    peak_tflops: Mapping[str, float]
    lacks: frozenset[str]
    matmul_efficiency: float | None
    memory_efficiency: float | None
    power_watts: float | None
    usd_per_hour: float | None
    intra_node_link: str
    source: str
    confidence: str
    notes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogLink:
    """A link class, one direction: per device inside a node (scope intra), per node outside (scope inter)."""

    name: str
    bandwidth_gb_s: float
    latency_us: float
    transport: str
    scope: str
    source: str
    confidence: str
    latency_source: str
    notes: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """How torch and Ray call a vendor's devices; None where there is none or none is known."""

    name: str
    torch_device: str
    backend: str | None
    visible_devices_variable: str | None
    ray_resource: str | None
    plugin: str
    evidence: str

    @property
    def has_native_collectives(self) -> bool:
        """Whether a collective library of its own is known. In host memory messages are quicker than the library's
        ring: 0.5 against 2 ms for 512 KiB between two ranks on two cores."""
        return self.backend is not None and self.torch_device != "cpu"


def device(name: str) -> CatalogDevice:
    """A device type by name. Raises UnknownName."""
    return _find(name, devices())


def link(name: str) -> CatalogLink:
    """A link class by name. Raises UnknownName."""
    return _find(name, links())


def model(name: str) -> dict[str, Any]:
    """A model by name, as `name` and the keys of Hugging Face's config.json. Raises UnknownName."""
    return copy.deepcopy(dict(_find(name, models())))


def vendor(name: str) -> Vendor:
    """A vendor by name. Raises UnknownName."""
    return _find(name, vendors())


@cache
def devices() -> Mapping[str, CatalogDevice]:
    """All device types by lower-case name."""
    return {row["device_type"].lower(): _device(row) for row in _rows("devices.csv")}


@cache
def links() -> Mapping[str, CatalogLink]:
    """All link classes by lower-case name."""
    return {row["link"].lower(): _link(row) for row in _rows("links.csv")}


@cache
def models() -> Mapping[str, Mapping[str, Any]]:
    """All models by lower-case name."""
    from hethub.specs.document import load_document

    table = load_document(_FOLDER / "models.yaml").value
    return {name.lower(): {"name": name, **entry["config"]} for name, entry in table.items()}


@cache
def vendors() -> Mapping[str, Vendor]:
    """All vendors by lower-case name."""
    return {row["vendor"].lower(): _vendor(row) for row in _rows("vendors.csv")}


def _find(name: str, table: Mapping[str, T]) -> T:
    found = table.get(name.lower())
    if found is None:
        raise UnknownName(name, [_name(entry) for entry in table.values()])
    return found


def _name(entry: Any) -> str:
    """A table's entry's name as written, not in lower case."""
    return str(entry["name"] if isinstance(entry, dict) else entry.name)


def _rows(file: str) -> list[dict[str, str]]:
    with (_FOLDER / file).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _figure(text: str) -> float | None:
    return float(text) if text else None


def _device(row: dict[str, str]) -> CatalogDevice:
    peaks = {
        row["matmul_dtype"]: _figure(row["peak_matmul_tflops"]),
        "fp32": _figure(row["peak_fp32_tflops"]),
    }
    if row["matmul_dtype"] == "bf16":
        # Tensor units that take bf16 take fp16 at the same rate, but for the rows that give their own.
        peaks["fp16"] = _figure(row["peak_fp16_tflops"]) or peaks["bf16"]
    return CatalogDevice(
        name=row["device_type"],
        vendor=row["vendor"],
        memory_gib=float(row["memory_gib"]),
        memory_bandwidth_gb_s=_figure(row["memory_bandwidth_gbs"]),
        peak_tflops={dtype: peak for dtype, peak in peaks.items() if peak is not None},
        lacks=frozenset(("bf16",) if row["matmul_dtype"] == "fp16" else ()),
        matmul_efficiency=_figure(row["matmul_efficiency"]),
        memory_efficiency=_figure(row["memory_efficiency"]),
        power_watts=_figure(row["tdp_w"]),
        usd_per_hour=_figure(row["on_demand_usd_per_hour"]),
        intra_node_link=row["intra_node_link"],
        source=row["source"],
        confidence=row["confidence"],
        notes=row["notes"],
    )


def _link(row: dict[str, str]) -> CatalogLink:
    return CatalogLink(
        name=row["link"],
        bandwidth_gb_s=float(row["bandwidth_gb_s"]),
        latency_us=float(row["latency_us"]),
        **{
            key: row[key] for key in ("transport", "scope", "source", "confidence", "latency_source", "notes")
        },
    )


def _vendor(row: dict[str, str]) -> Vendor:
    return Vendor(
        name=row["vendor"],
        torch_device=row["torch_device"],
        backend=row["backend"] or None,
        visible_devices_variable=row["visible_devices_variable"] or None,
        ray_resource=row["ray_resource"] or None,
        plugin=row["plugin"],
        evidence=row["evidence"],
    )
