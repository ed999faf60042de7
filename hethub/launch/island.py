"""Collectives inside an island: gradients to the members that get their sums, new weights to all (`program.islands`).

A collective is begun by its SEND and waited for by its RECEIVE; the vendor's library moves the bytes meanwhile. Its
members' shares are copied together, padded to the longest. What it takes of memory lasts no longer than that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hethub.launch.groups import Library, Wait
from hethub.launch.optimizer import joined
from hethub.launch.shards import Shards
from hethub.launch.streams import pack
from hethub.program.actions import Program, Transfer, What

__all__ = ["Island"]


class _Begun(NamedTuple):
    """A collective under way: the tensors are the library's until `wait` has returned. `result` is the own share's sum
    (longest,), or all shares' weights (members, longest)."""

    wait: Wait
    result: Tensor
    given: Tensor


class Island:
    """The collectives that one device takes part in; `libraries` by their members."""

    def __init__(
        self, program: Program, device: int, shards: Shards, libraries: Mapping[tuple[int, ...], Library]
    ) -> None:
        self.program = program
        self.device = device
        self.shards = shards
        self.libraries = libraries
        self._begun: dict[int, _Begun] = {}  # by message
        self._places: dict[tuple[What, tuple[int, ...]], list[Tensor]] = {}
        self._longest: dict[int, int] = {}  # message -> elements of its longest share

    def begin(self, message: int) -> None:
        """Give this device's part, as it is after all work so far."""
        transfer = self.program.transfer(message)
        library = self.libraries[transfer.members]
        if message not in self._longest:
            self._longest[message] = max(map(self.shards.ownership.route_elements, transfer.shares))
        elements = self._longest[message]
        if transfer.what == What.REDUCE_SCATTER:
            gradients = [self._lying(transfer.what, share) for share in transfer.shares]
            like = next(tensor for tensors in gradients for tensor in tensors)
            given = like.new_empty(library.size, elements)
            for tensors, row in zip(gradients, given, strict=True):
                _pack(tensors, row)
            result = given.new_empty(elements)
            wait = library.reduce_scatter(result, given)
        else:
            like = self.shards.weight(transfer.slices[0])
            given = like.new_empty(elements)
            _pack(self._lying(transfer.what, transfer.share(self.device)), given)
            result = given.new_empty(library.size, elements)
            wait = library.all_gather(result, given)
        self._begun[message] = _Begun(wait, result, given)

    def end(self, message: int) -> dict[int, Tensor]:
        """Wait. Sums are put into place, over this device's own gradients; new weights of the others' slices are
        returned, shaped like this device's own."""
        transfer = self.program.transfer(message)
        wait, result, _ = self._begun.pop(message)
        wait()
        if transfer.what == What.REDUCE_SCATTER:
            at = 0
            for place in self._lying(transfer.what, transfer.share(self.device)):
                place.copy_(result[at : at + place.numel()].view(place.shape))
                at += place.numel()
            return {}
        return self._new_weights(transfer, result)

    def _lying(self, what: What, slices: tuple[int, ...]) -> Sequence[Tensor]:
        """Where slices lie, neighbours as one."""
        if (what, slices) not in self._places:
            place = self.shards.gradient if what == What.REDUCE_SCATTER else self.shards.weight
            self._places[what, slices] = joined([place(n) for n in slices])
        return self._places[what, slices]

    def _new_weights(self, transfer: Transfer, result: Tensor) -> dict[int, Tensor]:
        found = {}
        for member, share, row in zip(transfer.members, transfer.shares, result, strict=True):
            at = 0
            for number in share if member != self.device else ():
                like = self.shards.weight(number)
                found[number] = row[at : at + like.numel()].view(like.shape)
                at += like.numel()
        return found


@torch.no_grad()
def _pack(parts: Sequence[Tensor], row: Tensor) -> None:
    pack(parts, row.view(torch.uint8))
