"""The `device_types` of a cluster file: catalog figures, overridden where the file says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from hethub import catalog
from hethub.specs.base import Name, Problems, Spec
from hethub.specs.document import Key
from hethub.specs.quantities import MEMORIES, PEAKS, one_of, write_exactly, write_memory, write_peaks
from hethub.specs.resolved import DeviceType

__all__ = ["DeviceTypeSpec", "resolve_device_type", "write_device_type"]

# What context, kernels, communication buffers and allocator gaps take of a real accelerator's memory.
# Sailor, whose predictions were checked against nvidia-smi, plans with 2.0e9 bytes without and 3.0e9 bytes
# with tensor parallelism.
DEFAULT_RESERVE_BYTES = 3 * 10**9

Precision = Literal["fp64", "fp32", "bf16", "fp16"]


class DeviceTypeSpec(Spec):
    """A device type as written: what the catalog lacks or what differs here. Null means unknown."""

    catalog: str | None = Field(
        None, description="Catalog device whose figures hold where none is given here."
    )
    vendor: Name | None = Field(None, description="Vendor, as in the catalog; cpu for CPU devices.")
    memory_gib: float | None = Field(None, gt=0, description="Memory of one device, GiB.")
    memory_mib: float | None = Field(None, gt=0, description="Memory of one device, MiB.")
    memory_reserve_gib: float | None = Field(None, ge=0, description="Memory that no plan may use, GiB.")
    memory_reserve_mib: float | None = Field(None, ge=0, description="Memory that no plan may use, MiB.")
    memory_bandwidth_gb_s: float | None = Field(
        None, gt=0, description="Peak memory bandwidth, 10^9 bytes/s."
    )
    peak_tflops: dict[Precision, float] | None = Field(
        None, description="Dense matrix-product peak by dtype, 10^12 FLOP/s."
    )
    peak_gflops: dict[Precision, float] | None = Field(
        None, description="Dense matrix-product peak by dtype, 10^9 FLOP/s."
    )
    matmul_efficiency: float | None = Field(
        None, gt=0, le=1, description="Share of the peak that large matrix products reach."
    )
    memory_efficiency: float | None = Field(
        None, gt=0, le=1, description="Share of the bandwidth that copies reach."
    )
    power_watts: float | None = Field(None, gt=0, description="Power of one device at full load, watts.")
    idle_power_watts: float | None = Field(
        None,
        ge=0,
        description="Power of one device that waits, watts; full power is taken where it is not given.",
    )
    communication_power_watts: float | None = Field(
        None, ge=0, description="Power of one device that only communicates, watts; full power if not given."
    )
    host_copy_gb_s: float | None = Field(
        None,
        gt=0,
        description="What one device moves to or from its host's memory, 10^9 bytes/s: host-staged messages are copied "
        "in chunks while others are on the wire. Copies are free where it is not given.",
    )
    usd_per_hour: float | None = Field(None, ge=0, description="Price of one device, US dollars per hour.")
    substitute_dtype: dict[Precision, Precision] = Field(
        {}, description="Dtypes to compute in where the device lacks one, such as {bf16: fp16}."
    )

    @model_validator(mode="after")
    def _one_unit_each(self) -> DeviceTypeSpec:
        for stem, units in (("memory", MEMORIES), ("memory_reserve", MEMORIES), ("peak", PEAKS)):
            one_of(self, stem, units)
        for peaks in (self.peak_tflops, self.peak_gflops):
            for dtype, peak in (peaks or {}).items():
                if peak <= 0:
                    raise ValueError(
                        f"the peak of {dtype}, {peak}, is not above 0. Give more or leave it out"
                    )
        return self

    def complete(self) -> bool:
        """Whether every figure is given, so that the catalog has nothing to add."""
        given = self.model_fields_set
        single = ("vendor", "memory_bandwidth_gb_s", "matmul_efficiency", "memory_efficiency")
        paired = (("memory", MEMORIES), ("memory_reserve", MEMORIES), ("peak", PEAKS))
        return {*single, "catalog", "power_watts", "usd_per_hour"} <= given and all(
            any(f"{stem}_{ending}" in given for ending in units) for stem, units in paired
        )


def resolve_device_type(
    name: str, spec: DeviceTypeSpec | None, problems: Problems, keys: Sequence[Key], *, emulated: bool
) -> DeviceType | None:
    """The device type with every figure known, or None after telling `problems` what is wrong.

    `keys` lead to the entry of device_types, or, without a `spec`, to where a group names a catalog device.
    """
    declared, spec = spec is not None, spec or DeviceTypeSpec()
    known: catalog.CatalogDevice | None = None
    if not spec.complete():
        wanted = spec.catalog if "catalog" in spec.model_fields_set else name
        try:
            known = None if wanted is None else catalog.device(wanted)
        except catalog.UnknownName as error:
            if "catalog" in spec.model_fields_set:
                problems.add((*keys, "catalog"), str(error))
                return None
    return _Figures(name, spec, known, problems, keys, declared=declared).device_type(emulated)


class _Figures:
    """A device type's figures, from the spec where it gives them, else from the catalog."""

    def __init__(
        self,
        name: str,
        spec: DeviceTypeSpec,
        known: catalog.CatalogDevice | None,
        problems: Problems,
        keys: Sequence[Key],
        *,
        declared: bool,
    ) -> None:
        self.name = name
        self.spec = spec
        self.known = known
        self.problems = problems
        self.keys = tuple(keys)
        self.declared = declared
        self.failed = False

    def device_type(self, emulated: bool) -> DeviceType | None:
        vendor = self._vendor()
        memory = self._memory()
        reserve = self._reserve(vendor, emulated)
        bandwidth = self._bandwidth()
        peaks = self._peaks()
        if memory is not None and reserve >= memory:
            self._refuse("memory_reserve_gib", f"{reserve} bytes leave nothing of {memory}. Give less.")
        for wanted, dtype in self.spec.substitute_dtype.items():
            if dtype not in peaks:
                self._refuse(
                    "substitute_dtype",
                    f"{self.name} has no known peak for {dtype} either, so it cannot stand in for {wanted}. "
                    "Give another, or its peak.",
                )
        if self.failed or memory is None or bandwidth is None or vendor is None:
            return None
        copied = self.spec.host_copy_gb_s
        catalog_name = self.known.name if self.known else self.spec.catalog
        return DeviceType(
            name=self.name,
            catalog=catalog_name,
            vendor=vendor,
            memory_bytes=memory,
            memory_reserve_bytes=reserve,
            memory_bandwidth_bytes_per_second=bandwidth,
            peak_flops_per_second=peaks,
            matmul_efficiency=self._given("matmul_efficiency") or catalog.DEFAULT_MATMUL_EFFICIENCY,
            memory_efficiency=self._given("memory_efficiency") or catalog.DEFAULT_MEMORY_EFFICIENCY,
            substitute_dtype={
                str(wanted): str(dtype) for wanted, dtype in self.spec.substitute_dtype.items()
            },
            power_watts=self._given("power_watts"),
            usd_per_hour=self._given("usd_per_hour"),
            idle_power_watts=self.spec.idle_power_watts,
            communication_power_watts=self.spec.communication_power_watts,
            host_copy_bytes_per_second=None if copied is None else copied * 1e9,
        )

    def _refuse(self, key: str, text: str) -> None:
        self.failed = True
        if self.declared:
            self.problems.add((*self.keys, key), text)
        else:
            self.problems.add(self.keys, f"{text} Add device_types: {{{self.name}: {{{key}: ...}}}}.")

    def _given(self, key: str) -> Any:
        """The spec's figure if it gives one, null included, else the catalog's."""
        if key in self.spec.model_fields_set:
            return getattr(self.spec, key)
        return getattr(self.known, key, None)

    def _vendor(self) -> str | None:
        name = self._given("vendor")
        if name is None:
            self._refuse(
                "vendor", "required key is missing. Name a vendor (cpu for CPU devices) or a catalog device."
            )
            return None
        try:
            return catalog.vendor(name).name
        except catalog.UnknownName as error:
            self._refuse("vendor", str(error))
            return None

    def _memory(self) -> int | None:
        given = one_of(self.spec, "memory", MEMORIES)
        if given is None and self.known is not None:
            given = self.known.memory_gib, MEMORIES["gib"]
        if given is None:
            self._refuse("memory_gib", "the device's memory is unknown. Give memory_gib or memory_mib.")
            return None
        return round(float(given[0]) * given[1])

    def _reserve(self, vendor: str | None, emulated: bool) -> int:
        given = one_of(self.spec, "memory_reserve", MEMORIES)
        if given is not None:
            return round(float(given[0]) * given[1])
        # CPU devices hold tensors only, and so do emulated ones, whose memory is tallied tensor by tensor.
        return 0 if emulated or vendor == "cpu" else DEFAULT_RESERVE_BYTES

    def _bandwidth(self) -> float | None:
        figure = self._given("memory_bandwidth_gb_s")
        if figure is None:
            self._refuse(
                "memory_bandwidth_gb_s", f"the memory bandwidth of {self.name} is unknown. Give it, in GB/s."
            )
            return None
        return float(figure * 1e9)

    def _peaks(self) -> dict[str, float]:
        peaks = {d: p * PEAKS["tflops"] for d, p in self.known.peak_tflops.items()} if self.known else {}
        given = one_of(self.spec, "peak", PEAKS)
        if given is not None:
            peaks |= {dtype: peak * given[1] for dtype, peak in given[0].items()}
        return peaks


def write_device_type(device_type: DeviceType) -> dict[str, Any]:
    """The mapping that `resolve_device_type` reads back as an equal type without the catalog."""
    return {
        "catalog": device_type.catalog,
        "vendor": device_type.vendor,
        **write_memory("memory", device_type.memory_bytes),
        **write_memory("memory_reserve", device_type.memory_reserve_bytes),
        **write_exactly("memory_bandwidth_gb_s", device_type.memory_bandwidth_bytes_per_second, 1e9),
        **write_peaks("peak", device_type.peak_flops_per_second),
        "matmul_efficiency": device_type.matmul_efficiency,
        "memory_efficiency": device_type.memory_efficiency,
        "power_watts": device_type.power_watts,
        "usd_per_hour": device_type.usd_per_hour,
        **{
            key: watts
            for key in ("idle_power_watts", "communication_power_watts")
            if (watts := getattr(device_type, key)) is not None
        },
        **(
            {}
            if device_type.host_copy_bytes_per_second is None
            else {"host_copy_gb_s": device_type.host_copy_bytes_per_second / 1e9}
        ),
        **({"substitute_dtype": dict(device_type.substitute_dtype)} if device_type.substitute_dtype else {}),
    }
