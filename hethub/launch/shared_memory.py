"""Memory that workers of one host read from each other in place, so that parameters between them need no message.

A worker puts its weights and gradients on a heap of its own, an anonymous file in memory that ends with the processes
which have it open. Workers tell each other where things lie. Whoever can map the other's heap reads it there, and the
message that would have carried the bytes becomes a bell.

Why the bytes stay until they are read. Gradients change next when the last UPDATE clears them. UPDATE waits for the
total of the norm, which waits for the norms of all devices, each of which stands behind the device's own REDUCE. New
weights change at the next UPDATE, and the total before it waits for devices that have begun their step with GATHER.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hethub.launch.communicator import guard
from hethub.launch.heap import NONCE_BYTES, Heap
from hethub.launch.shards import Shards
from hethub.program.actions import Program, What
from hethub.program.ownership import Ownership

__all__ = ["Agreed", "agree", "describe", "look_at"]

_IN_PLACE = (What.REDUCE, What.WEIGHTS)


class _Shard(NamedTuple):
    """Where one parameter's shard lies: `first` is the first index of the cut axis that it begins at."""

    offset: int
    shape: list[int]
    first: int
    dtype: str


def _host() -> str:
    """The same for processes that can see each other's files: one boot, one set of process ids, one user."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino} {os.getuid()}"
    except OSError:
        return ""


def _table(heap: Heap, tensors: Mapping[str, Tensor], first: Mapping[str, int]) -> dict[str, _Shard]:
    found: dict[str, _Shard] = {}
    for name, tensor in tensors.items():
        offset = heap.offset(tensor)
        if offset is None:
            raise AssertionError(f"{name} is not on the heap")
        found[name] = _Shard(
            offset, list(tensor.shape), first[name], str(tensor.dtype).removeprefix("torch.")
        )
    return found


def describe(heap: Heap, shards: Shards) -> dict[str, Any]:
    """Where a heap is and what lies where in it, for `look_at` in another process."""
    return {
        "host": _host(),
        "process": os.getpid(),
        "file": heap.file,
        "nonce": heap.nonce.hex(),
        "weights": _table(heap, shards.weights, shards.first),
        "gradients": _table(heap, shards.gradients, shards.first),
    }


def look_at(ownership: Ownership, told: Mapping[str, Any]) -> Shards | None:
    """Map another worker's heap; None where that cannot be done."""
    try:
        file = os.open(f"/proc/{told['process']}/fd/{told['file']}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if os.pread(file, NONCE_BYTES, 0).hex() != told["nonce"]:
            return None
        whole = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the buffer is not writable is what we want
        buffer = torch.frombuffer(whole, dtype=torch.uint8)
    tables = [{name: _Shard(*shard) for name, shard in told[key].items()} for key in ("weights", "gradients")]
    weights, gradients = ({name: _view(buffer, shard) for name, shard in table.items()} for table in tables)
    return Shards(ownership, weights, gradients, {name: shard.first for name, shard in tables[0].items()})


def _view(buffer: Tensor, shard: _Shard) -> Tensor:
    dtype: torch.dtype = getattr(torch, shard.dtype)
    size = math.prod(shard.shape) * dtype.itemsize
    return buffer[shard.offset : shard.offset + size].view(dtype).view(shard.shape)


class Agreed(NamedTuple):
    """`neighbours[d]` is what device d holds, seen where it lies: writing to it ends the process. `bells` are the
    transfers (by number) whose bytes are read in place, by this device or by another."""

    neighbours: Mapping[int, Shards]
    bells: frozenset[int]


def agree(
    program: Program, device: int, rank_of: Mapping[int, int], heap: Heap | None, shards: Shards
) -> Agreed:
    """Find out with all devices that exchange parameters with this one which of them read in place.

    All devices of a task that have work call this, without a heap too. Raises PeerLostError.
    """
    ways = {n: t for n, t in enumerate(program.transfers) if t.what in _IN_PLACE and device in t[1:3]}
    sources = {t.source for t in ways.values()} - {device}
    others = sorted(sources | {t.destination for t in ways.values()} - {device})
    mine = {"host": ""} if heap is None else describe(heap, shards)
    told = _ask(dict.fromkeys(others, mine), rank_of)
    neighbours = {}
    for other in sources:
        if mine["host"] and told[other]["host"] == mine["host"]:
            found = look_at(shards.ownership, told[other])
            if found is not None:
                neighbours[other] = found
    reads = _ask({other: other in neighbours for other in others}, rank_of)
    bells = {
        n
        for n, t in ways.items()
        if (t.source in neighbours if t.destination == device else reads[t.destination])
    }
    return Agreed(neighbours, frozenset(bells))


def _ask(words: Mapping[int, object], rank_of: Mapping[int, int]) -> dict[int, Any]:
    """Tell each device something and hear what it has to say: as JSON, behind its length."""
    letters = {
        d: torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        for d, said in words.items()
    }
    lengths = _swap(
        {d: torch.tensor([len(letter)]) for d, letter in letters.items()}, dict.fromkeys(words, 1), rank_of
    )
    heard = _swap(letters, {d: int(length) for d, length in lengths.items()}, rank_of)
    return {d: json.loads(bytes(letter.tolist())) for d, letter in heard.items()}


def _swap(
    out: Mapping[int, Tensor], lengths: Mapping[int, int], rank_of: Mapping[int, int]
) -> dict[int, Tensor]:
    """Send every device a tensor and receive one of this length from each."""
    found = {d: torch.empty(lengths[d], dtype=tensor.dtype) for d, tensor in out.items()}
    works = []
    for d, tensor in out.items():
        works += [
            (guard(partial(start, t, rank_of[d]), d), d)
            for start, t in ((dist.isend, tensor), (dist.irecv, found[d]))
        ]
    for work, d in works:
        assert work is not None
        guard(work.wait, d)
    return found
