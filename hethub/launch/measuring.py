"""Measuring this machine into a folder of the profile format, which is written as it goes and gone on with."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from hethub import catalog
from hethub.cost.profiles.profile import Profile, TransferRow, load_profile, save_profile
from hethub.cost.shapes import layer_kind
from hethub.errors import MachineError
from hethub.launch.profiler import (
    LayerProfiler,
    Spread,
    copy_bytes_per_second,
    product_flops_per_second,
    repeated,
)
from hethub.launch.worker import DTYPES
from hethub.specs.cluster import DeviceType
from hethub.specs.workload import Workload

__all__ = ["Measured", "measure_device", "measure_layers", "measure_sends"]

_SEND_BYTES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
_ANSWER_SECONDS = 120.0


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
    reach, and messages as `link_class` where one is named. Raises MachineError where torch has no such device."""
    torch_device = torch.device(catalog.vendor(device_type.vendor).torch_device)
    module = getattr(torch, torch_device.type, None)
    if torch_device.type != "cpu" and not (module and module.is_available()):
        raise MachineError(
            f"torch finds no {torch_device.type} device here. Measure on a machine that has one."
        )
    precision = device_type.dtype_for(workload.precision)
    dtype = DTYPES[precision]

    def tell(measured: Measured) -> None:
        spread = measured.spread
        say(
            f"{measured.what:34} {spread.seconds * 1e3:10.3f} ms   quartiles {100 * spread.ratio:5.1f} % apart"
        )

    profiler = LayerProfiler(
        workload.model, device_type.name, workload.sequence_length, workload.precision, dtype, torch_device
    )
    new = measure_layers(profiler, rows, folder, budget_seconds, tell)
    new += measure_sends(link_class, folder, budget_seconds, tell) if link_class else 0
    flops = product_flops_per_second(torch_device, dtype, budget_seconds)
    traffic = copy_bytes_per_second(torch_device, budget_seconds)
    say(f"a product reaches {flops / 1e9:.4g} Gflop/s ({precision}), a copy moves {traffic / 1e9:.4g} GB/s")
    say(f"{new} new rows in {folder}")


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


def measure_sends(
    link_class: str, folder: Path, budget_seconds: float, say: Callable[[Measured], None]
) -> int:
    """Measure messages between two processes of this host, one way, over the library that training uses between
    unlike devices; returns how many sizes were new. Raises MachineError when the processes do not answer."""
    profile = open_profile(folder)
    known = {
        row.message_bytes
        for row in profile.transfers
        if (row.operation, row.link_class) == ("send", link_class)
    }
    wanted = [size for size in _SEND_BYTES if size not in known]
    if not wanted:
        return 0
    for size, spread in zip(wanted, _sends(wanted, budget_seconds), strict=True):
        row = TransferRow(
            operation="send",
            link_class=link_class,
            group_size=1,
            message_bytes=size,
            time_seconds=spread.seconds,
        )
        profile = replace(profile, transfers=(*profile.transfers, row))
        say(Measured(f"send {size} bytes over {link_class}", spread))
    save_profile(profile, folder)
    return len(wanted)


def _sends(sizes: Sequence[int], budget_seconds: float) -> list[Spread]:
    """Half of a round trip's time for each size."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    processes = [
        context.Process(
            target=_end, args=(rank, store.port, tuple(sizes), budget_seconds, theirs), daemon=True
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        if not ours.poll(_ANSWER_SECONDS + 10 * budget_seconds * len(sizes)):
            raise MachineError(
                "two processes of this host do not answer each other. Look at GLOO_SOCKET_IFNAME."
            )
        found: list[Spread] = ours.recv()
        return found
    except EOFError:
        raise MachineError("the processes that measure messages have ended. Run with --debug.") from None
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _end(rank: int, port: int, sizes: Sequence[int], budget_seconds: float, answer: Connection) -> None:
    """One end: the first times round trips and tells the other whether another one comes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    more = torch.ones(1, dtype=torch.uint8)
    spreads = []
    for size in sizes:
        buffer = torch.zeros(size, dtype=torch.uint8)

        def once(buffer: torch.Tensor = buffer) -> list[float]:
            dist.send(more, 1)
            begin = time.perf_counter()
            dist.send(buffer, 1)
            dist.recv(buffer, 1)
            return [(time.perf_counter() - begin) / 2]

        if rank == 0:
            spreads += repeated(once, budget_seconds)
            dist.send(torch.zeros(1, dtype=torch.uint8), 1)
        else:
            while True:
                dist.recv(more, 0)
                if not more.item():
                    break
                dist.recv(buffer, 0)
                dist.send(buffer, 0)
            more.fill_(1)
    if rank == 0:
        answer.send(spreads)
    dist.barrier()
    dist.destroy_process_group()
