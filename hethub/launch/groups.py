"""Tensor-parallel groups: inside an island the vendor library's collectives, else an exchange of messages."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hethub.launch.communicator import guard
from hethub.specs.layout import sequence_span
from hethub.timeline.record import Lane

__all__ = ["ExchangeGroup", "Library", "NativeGroup", "SoloGroup", "TensorGroup", "Wait"]

_EXCHANGE_TAG = len(Lane)
Wait = Callable[[], object]


class TensorGroup(Protocol):
    """A tensor-parallel group: `size` members, of which this is number `member`.

    Every member makes the same calls in the same order. `sum` and `max` are in place and give every member the same
    bits. Sequences are cut along dimension 1 by `sequence_span`.
    """

    size: int
    member: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over members, in place."""
        ...

    def max(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over members, in place."""
        ...

    def all_gather(self, shard: Tensor, length: int) -> Tensor:
        """This member's (B, s, ...) -> everyone's (B, length, ...). A new tensor, except in a group of one."""
        ...

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """(B, length, ...) of every member -> this member's (B, s, ...) of their sum. As new as `all_gather`'s."""
        ...


class SoloGroup:
    """A group of one: everything is there already."""

    size = 1
    member = 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def all_gather(self, shard: Tensor, length: int) -> Tensor:
        """The tensor itself."""
        return shard

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """The tensor itself."""
        return whole


class _Timed:
    """Notes when a group is in a collective: monotonic seconds, or what else `moment` is set to tell."""

    def __init__(self) -> None:
        self.moment: Callable[[], Any] = time.monotonic
        self.events: list[tuple[Any, Any]] = []

    def timed(self, call: Callable[[], object]) -> None:
        start = self.moment()
        call()
        self.events.append((start, self.moment()))

    def take_events(self) -> list[tuple[Any, Any]]:
        """The (start, end) moments of every collective since the last call."""
        events, self.events = self.events, []
        return events


# torch 2.13 renamed them; older ones know the second name only.
_all_gather_whole: Callable[..., dist.Work | None] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_reduce_scatter_whole: Callable[..., dist.Work | None] = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


class Library:
    """A vendor library's collectives among some ranks of an island, which all make the same calls in the same order.

    A call returns how to wait for its end. With `overlaps` it only begins the collective: on an accelerator what is
    queued after the wait waits, and the host goes on. `whole_tensors` turns false when the library says that it lacks
    the collectives of one tensor; then lists are gathered, and a part of an all-reduce is taken.
    """

    def __init__(self, ranks: Sequence[int], backend: str, *, overlaps: bool = False) -> None:
        self.size = len(ranks)
        self.member = list(ranks).index(dist.get_rank())
        self.whole_tensors = True
        self._overlaps = overlaps
        self._group = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)

    def all_reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Wait:
        """In place; every member gets the same bits."""
        return guard(lambda: self._begin(dist.all_reduce, tensor, operation), -1)

    def all_gather(self, found: Tensor, own: Tensor) -> Wait:
        """Into found (size, ...) everyone's own (...), contiguous both."""
        return self._try(
            lambda: self._begin(_all_gather_whole, found.view(-1), own.view(-1)),
            lambda: self._begin(dist.all_gather, list(found.unbind(0)), own),
        )

    def reduce_scatter(self, found: Tensor, given: Tensor) -> Wait:
        """Into found (...) the sum of everyone's given (size, ...) at this member's place, contiguous both. The sum of
        all may be formed in `given`."""

        def by_sum() -> Wait:
            wait = self.all_reduce(given, dist.ReduceOp.SUM)

            def take() -> None:
                wait()
                found.copy_(given[self.member])

            return take

        return self._try(lambda: self._begin(_reduce_scatter_whole, found.view(-1), given.view(-1)), by_sum)

    def _begin(self, collective: Callable[..., dist.Work | None], *tensors: object) -> Wait:
        work = collective(*tensors, group=self._group, async_op=self._overlaps)
        return (lambda: None) if work is None else lambda: guard(work.wait, -1)

    def _try(self, whole: Callable[[], Wait], otherwise: Callable[[], Wait]) -> Wait:
        """A library that lacks a collective says so before it sends anything, so all members turn to the other."""

        def call() -> Wait:
            if self.whole_tensors:
                try:
                    return whole()
                except (NotImplementedError, RuntimeError) as error:
                    if "support" not in str(error) and not isinstance(error, NotImplementedError):
                        raise
                    self.whole_tensors = False
            return otherwise()

        return guard(call, -1)


class NativeGroup(_Timed):
    """A tensor-parallel group inside one island: the vendor library's own collectives."""

    def __init__(self, library: Library) -> None:
        super().__init__()
        self.size = library.size
        self.member = library.member
        self.library = library

    def _run(self, begin: Callable[[], Wait]) -> None:
        def run() -> None:
            wait = begin()
            wait()

        self.timed(run)

    def sum(self, tensor: Tensor) -> Tensor:
        """In place; every member gets the same bits."""
        self._run(lambda: self.library.all_reduce(tensor, dist.ReduceOp.SUM))
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """In place."""
        self._run(lambda: self.library.all_reduce(tensor, dist.ReduceOp.MAX))
        return tensor

    def all_gather(self, shard: Tensor, length: int) -> Tensor:
        """(B, s, ...) -> (B, length, ...), by the library on shards padded to equal length."""
        rows, held, *rest = shard.shape
        equal = -(-length // self.size)
        if held < equal:
            shard = torch.cat([shard, shard.new_zeros(rows, equal - held, *rest)], 1)
        shard = shard.contiguous()
        found = shard.new_empty(self.size, rows, equal, *rest)
        self._run(lambda: self.library.all_gather(found, shard))
        whole: Tensor = found.transpose(0, 1).flatten(1, 2)[:, :length].contiguous()
        return whole

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """(B, length, ...) -> (B, s, ...), by the library on shards padded to equal length."""
        rows, length, *rest = whole.shape
        equal = -(-length // self.size)
        padding = equal * self.size - length
        if padding:
            whole = torch.cat([whole, whole.new_zeros(rows, padding, *rest)], 1)
        given = whole.unflatten(1, (self.size, equal)).transpose(0, 1).contiguous()
        found = given.new_empty(rows, equal, *rest)
        self._run(lambda: self.library.reduce_scatter(found, given))
        start, stop = sequence_span(length, self.size, self.member)
        shard: Tensor = found[:, : stop - start].contiguous()
        return shard


class ExchangeGroup(_Timed):
    """A group across islands, whose vendor libraries do not mix: everyone sends to everyone through host memory, and
    each adds in rank order, so that all members get the same bits. Only real tokens travel, no padding."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        self.size = len(ranks)
        self.member = list(ranks).index(dist.get_rank())
        self._ranks = list(ranks)
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def _buffer(self, member: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory for what `member` sends, used again by the next collective."""
        wanted = math.prod(shape)
        buffer = self._buffers.get((member, dtype))
        if buffer is None or buffer.numel() < wanted:
            buffer = self._buffers[member, dtype] = torch.empty(wanted, dtype=dtype)
        return buffer[:wanted].view(*shape)

    def _exchange(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> None:
        """Send outgoing[m] to and receive incoming[m] from every other member m; host memory, contiguous."""
        pending: list[dist.Work | None] = []
        for member, rank in enumerate(self._ranks):
            if member != self.member and incoming[member].numel():
                pending.append(
                    guard(lambda m=member, r=rank: dist.irecv(incoming[m], r, tag=_EXCHANGE_TAG), rank)  # type: ignore[misc]
                )
        for member, rank in enumerate(self._ranks):
            if member != self.member and outgoing[member].numel():
                pending.append(
                    guard(lambda m=member, r=rank: dist.isend(outgoing[m], r, tag=_EXCHANGE_TAG), rank)  # type: ignore[misc]
                )
        for work in pending:
            assert work is not None
            guard(work.wait, -1)

    def _reduce(self, tensor: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def exchange() -> None:
            own = tensor.detach().to("cpu").contiguous()
            pieces = [self._buffer(m, own.shape, own.dtype) for m in range(self.size)]
            pieces[self.member] = own
            self._exchange([own] * self.size, pieces)
            total = combine(pieces[0], pieces[1])
            for piece in pieces[2:]:
                total = combine(total, piece)
            tensor.copy_(total)

        self.timed(exchange)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, added in rank order."""
        return self._reduce(tensor, torch.add)

    def max(self, tensor: Tensor) -> Tensor:
        """In place."""
        return self._reduce(tensor, torch.maximum)

    def all_gather(self, shard: Tensor, length: int) -> Tensor:
        """(B, s, ...) -> (B, length, ...)."""
        rows, _, *rest = shard.shape
        whole = torch.empty(rows, length, *rest, dtype=shard.dtype)
        spans = [sequence_span(length, self.size, m) for m in range(self.size)]

        def exchange() -> None:
            own = shard.detach().to("cpu").contiguous()
            if rows == 1:  # each shard has a contiguous place of its own: receive there
                pieces = [whole[:, start:stop] for start, stop in spans]
            else:
                pieces = [
                    self._buffer(m, (rows, stop - start, *rest), own.dtype)
                    for m, (start, stop) in enumerate(spans)
                ]
            self._exchange([own] * self.size, pieces)
            for m, (start, stop) in enumerate(spans):
                if m == self.member:
                    whole[:, start:stop] = own
                elif rows > 1:
                    whole[:, start:stop] = pieces[m]

        self.timed(exchange)
        return whole.to(shard.device)

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """(B, length, ...) -> (B, s, ...), added in rank order."""
        rows, length, *rest = whole.shape
        spans = [sequence_span(length, self.size, m) for m in range(self.size)]
        start, stop = spans[self.member]
        found = torch.empty(rows, stop - start, *rest, dtype=whole.dtype)

        def exchange() -> None:
            own = whole.detach().to("cpu")
            outgoing = [own[:, a:b].contiguous() for a, b in spans]
            pieces = [self._buffer(m, found.shape, found.dtype) for m in range(self.size)]
            pieces[self.member] = outgoing[self.member]
            self._exchange(outgoing, pieces)
            torch.add(pieces[0], pieces[1], out=found)
            for piece in pieces[2:]:
                found.add_(piece)

        self.timed(exchange)
        return found.to(whole.device)
