"""Measuring this machine into a folder of the profile format, which is written as it goes and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from hethub import catalog
from hethub.cost.profiles.profile import Profile, TransferRow, host_class, load_profile, save_profile
from hethub.cost.shapes import layer_kind
from hethub.errors import InputError, MachineError
from hethub.launch.link_profiler import Exchange, measure_exchanges
from hethub.launch.profiler import (
    LayerProfiler,
    Spread,
    copy_bytes_per_second,
    product_flops_per_second,
)
from hethub.launch.worker import DTYPES
from hethub.specs.cluster import DeviceType
from hethub.specs.workload import Workload

__all__ = ["Measured", "measure_device", "measure_layers", "measure_links"]

_SEND_BYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_WORK_BYTES = (1 << 10, 1 << 18, 1 << 22)
_GROUP_BYTES = (1 << 14, 1 << 18, 1 << 20, 1 << 22)


class Measured(NamedTuple):
    """One thing that was measured, in words, and how repeatable it was."""

    what: str
    spread: Spread


def measure_device(
    device_type: DeviceType,
    workload: Workload,
    rows: Sequence[int],
    folder: Path,
    budget_seconds: float,
    link_class: str | None,
    say: Callable[[str], None],
) -> None:
    """Measure this machine as a device of `device_type` for a workload: layers at these rows, what a product and a copy
    reach, and messages as `link_class` where one is named. Raises MachineError where torch has no such device and
    InputError for a precision that nothing runs in yet, or a folder that cannot be written."""
    precision = device_type.dtype_for(workload.precision)
    dtype = DTYPES.get(precision)
    if dtype is None:
        raise InputError(
            f"device type {device_type.name}: would be measured in {precision}, which is planned but not run yet. "
            f"Set the workload's precision, or its substitute_dtype, to one of {', '.join(DTYPES)}."
        )

    torch_device = _torch_device(catalog.vendor(device_type.vendor))

    def tell(measured: Measured) -> None:
        spread = measured.spread
        say(
            f"{measured.what:34} {spread.seconds * 1e3:10.3f} ms   quartiles {100 * spread.ratio:5.1f} % apart"
        )

    profiler = LayerProfiler(
        workload.model, device_type.name, workload.sequence_length, workload.precision, dtype, torch_device
    )
    new = measure_layers(profiler, rows, folder, budget_seconds, tell)
    if link_class is not None:
        host = host_class(device_type.name) if torch_device.type == "cpu" else None
        new += measure_links(link_class, host, folder, budget_seconds, tell)
    flops = product_flops_per_second(torch_device, dtype, budget_seconds)
    traffic = copy_bytes_per_second(torch_device, budget_seconds)
    say(f"a product reaches {flops / 1e9:.4g} Gflop/s ({precision}), a copy moves {traffic / 1e9:.4g} GB/s")
    say(f"{new} new rows in {folder}")


def _torch_device(vendor: catalog.Vendor) -> torch.device:
    missing = MachineError(
        f"torch finds no {vendor.torch_device} device here (vendor {vendor.name}, plug-in: {vendor.plugin}). "
        "Measure on a machine that has one."
    )
    try:
        found = torch.device(vendor.torch_device)
    except RuntimeError:  # a name that only a vendor's plug-in brings
        raise missing from None
    module = getattr(torch, found.type, None)
    if found.type != "cpu" and not (module and module.is_available()):
        raise missing
    return found


def open_profile(folder: Path) -> Profile:
    """What a folder holds so far; nothing where it has no profile yet. Raises InputError for one that is wrong."""
    return load_profile(folder) if (folder / "layers.csv").exists() else Profile((), ())


def measure_layers(
    profiler: LayerProfiler,
    rows: Sequence[int],
    folder: Path,
    budget_seconds: float,
    say: Callable[[Measured], None],
) -> int:
    """Measure each kind of layer at each number of rows that the folder lacks; returns how many were new.

    The folder is written after each, so that an interrupted measurement goes on where it stopped.
    """
    profile = open_profile(folder)
    new = 0
    for _, layer in profiler.layers():
        for count in rows:
            if any(row.micro_batch == count for row in profile.rows(profiler.key(layer))):
                continue
            row, spreads = profiler.measure(layer, count, budget_seconds)
            profile = replace(profile, layers=(*profile.layers, row))
            save_profile(profile, folder)
            new += 1
            for what, spread in spreads.items():
                say(Measured(f"{layer_kind(profiler.model, layer)} {what}, {count} rows", spread))
    return new


def measure_links(
    link_class: str,
    host_class: str | None,
    folder: Path,
    budget_seconds: float,
    say: Callable[[Measured], None],
) -> int:
    """Measure messages and collectives of a group of two between processes of this host as `link_class`, and, where
    `host_class` is given, the CPU time that a message takes at either end as that; returns how many rows were new.
    Raises MachineError when the processes do not answer."""
    profile = open_profile(folder)
    known = {(row.operation, row.link_class, row.message_bytes) for row in profile.transfers}
    rows = [
        TransferRow(
            operation=operation, link_class=where, group_size=group, message_bytes=size, time_seconds=0.0
        )
        for operation, where, group, sizes in (
            ("send", link_class, 1, _SEND_BYTES),
            *((work, host_class, 1, _WORK_BYTES) for work in ("send_work", "receive_work")),
            *((name, link_class, 2, _GROUP_BYTES) for name in ("all_gather", "reduce_scatter", "all_reduce")),
        )
        if where is not None
        for size in sizes
        if (operation, where, size) not in known
    ]
    if not rows:
        return 0
    wanted = [Exchange(row.operation, int(row.message_bytes)) for row in rows]
    found = measure_exchanges(wanted, budget_seconds)
    for row, spread in zip(rows, found, strict=True):
        say(Measured(f"{row.operation} {row.message_bytes:.0f} bytes, {row.link_class}", spread))
    new = [replace(row, time_seconds=s.seconds) for row, s in zip(rows, found, strict=True)]
    save_profile(replace(profile, transfers=(*profile.transfers, *new)), folder)
    return len(new)
