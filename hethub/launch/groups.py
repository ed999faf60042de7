"""Tensor-parallel groups: inside an island the vendor library's collectives, else an exchange of messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hethub.launch.communicator import guard
from hethub.timeline.record import Lane

__all__ = ["ExchangeGroup", "NativeGroup"]

_EXCHANGE_TAG = len(Lane)


class _Timed:
    """Counts the seconds and the moments that a group spends in collectives."""

    def __init__(self) -> None:
        self.events: list[tuple[float, float]] = []

    def timed(self, call: Callable[[], object]) -> None:
        start = time.monotonic()
        call()
        self.events.append((start, time.monotonic()))

    def take_events(self) -> list[tuple[float, float]]:
        """The (start, end) monotonic seconds of every collective since the last call."""
        events, self.events = self.events, []
        return events


class NativeGroup(_Timed):
    """A tensor-parallel group inside one island: the vendor library's own collectives."""

    def __init__(self, ranks: Sequence[int], backend: str) -> None:
        super().__init__()
        self.size = len(ranks)
        self._group = dist.new_group(list(ranks), backend=backend, use_local_synchronization=True)

    def _reduce(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        self.timed(lambda: guard(lambda: dist.all_reduce(tensor, operation, group=self._group), -1))
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """In place; every member gets the same bits."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: Tensor) -> Tensor:
        """In place."""
        return self._reduce(tensor, dist.ReduceOp.MAX)


class ExchangeGroup(_Timed):
    """A group across islands, whose vendor libraries do not mix: everyone sends to everyone through host memory, and
    each adds in rank order, so that all members get the same bits."""

    def __init__(self, ranks: Sequence[int]) -> None:
        super().__init__()
        self.size = len(ranks)
        self._ranks = list(ranks)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        own = tensor.detach().to("cpu").contiguous()
        me = dist.get_rank()
        found = {me: own}
        pending: list[dist.Work | None] = []
        for rank in self._ranks:
            if rank != me:
                found[rank] = torch.empty_like(own)
                pending.append(guard(lambda r=rank: dist.irecv(found[r], r, tag=_EXCHANGE_TAG), rank))  # type: ignore[misc]
        for rank in self._ranks:
            if rank != me:
                pending.append(guard(lambda r=rank: dist.isend(own, r, tag=_EXCHANGE_TAG), rank))  # type: ignore[misc]
        for work in pending:
            assert work is not None
            guard(work.wait, -1)
        return [found[rank] for rank in self._ranks]

    def _reduce(self, tensor: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def exchange() -> None:
            first, *rest = self._gather(tensor)
            total = first.clone()
            for other in rest:
                total = combine(total, other)
            tensor.copy_(total)

        self.timed(exchange)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, added in rank order."""
        return self._reduce(tensor, torch.add)

    def max(self, tensor: Tensor) -> Tensor:
        """In place."""
        return self._reduce(tensor, torch.maximum)
