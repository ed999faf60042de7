"""The parameter lane of one device: gradients to their updaters, the norm, the update, new weights to their holders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hethub.launch.optimizer import Updater, joined
from hethub.launch.shards import Shards
from hethub.program.actions import SUMS, Program, Transfer, What
from hethub.specs.job import OptimizerSettings

__all__ = ["NotFiniteError", "ParameterLane"]


class NotFiniteError(FloatingPointError):
    """The loss or the gradient norm is not finite. `suspicion` of this device: 2 where its own gradient or loss is not
    finite, 1 where a sum is that it updates, to which others gave their part, 0 where all that it sees is finite."""

    def __init__(self, text: str, *, suspicion: int) -> None:
        super().__init__(text)
        self.suspicion = suspicion


class ParameterLane:
    """What a device holds of the parameters, and what the actions of the parameter lane do with it.

    `neighbours` are devices whose shards are read where they lie; messages from them carry nothing.
    """

    def __init__(
        self,
        program: Program,
        device: int,
        shards: Shards,
        settings: OptimizerSettings,
        neighbours: Mapping[int, Shards],
    ) -> None:
        self.program = program
        self.device = device
        self.shards = shards
        self.neighbours = neighbours
        self.updater = Updater(shards, program.buckets.get(device, ()), settings)
        self.is_root = device == program.layout.used[0]
        self._pieces: dict[int, dict[int, Tensor]] = defaultdict(dict)  # slice -> sender -> gradient
        self._new: dict[int, Tensor] = {}  # slice -> new weight
        self._norms: dict[int, Tensor] = {}  # sender -> sum of squares and loss
        self._totals: Tensor | None = None
        self._places: dict[tuple[What, tuple[int, ...]], list[Tensor]] = {}  # of what messages carry
        self.losses: list[Tensor] = []  # of this device's micro-batches: numbers, still on the device
        self.squares = 0.0
        self.skips = False  # make no update where the gradient is not finite, instead of raising

    def begin(self) -> None:
        """Forget the sums of the step before."""
        self._norms.clear()
        self._totals = None
        self.losses.clear()
        self.squares = 0.0

    @property
    def loss(self) -> float:
        """The sum over this device's tokens so far. Waits for the device."""
        return sum(float(loss) for loss in self.losses)

    # -- messages --------------------------------------------------------------------------------------------------

    def outgoing(self, transfer: Transfer) -> Sequence[Tensor]:
        """The tensors that a message carries, one after the other."""
        if transfer.what in (What.REDUCE, What.WEIGHTS, What.RELAY):
            key = (transfer.what, transfer.slices)
            if key not in self._places:
                place = self.shards.gradient if transfer.what == What.REDUCE else self.shards.weight
                self._places[key] = joined([place(n) for n in transfer.slices])
            return self._places[key]
        if transfer.what == What.NORM:
            return [torch.tensor([self.squares, self.loss], dtype=torch.float64)]
        return [self.totals()]

    def keep(self, transfer: Transfer, payload: Tensor) -> None:
        """Take a received payload (uint8, the device's own from now on)."""
        if transfer.what in SUMS:
            values = payload.view(torch.float64)
            if transfer.what == What.NORM:
                self._norms[transfer.source] = values
            else:
                self._totals = values
            return
        pieces = self._apart(transfer, payload)
        if transfer.what == What.REDUCE:
            for number, piece in pieces:
                self._pieces[number][transfer.source] = piece
        elif transfer.what == What.RELAY:
            for number, piece in pieces:  # what is passed on is given from its place
                self.shards.weight(number).copy_(piece)
        else:
            self._new.update(pieces)

    def keep_weights(self, found: Mapping[int, Tensor]) -> None:
        """Take new weights of slices, which GATHER puts into place."""
        self._new.update(found)

    def _apart(self, transfer: Transfer, payload: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The slices of a message, shaped like this device's own: in the payload, or where a neighbour has them."""
        held = self.neighbours.get(transfer.source)
        if held is not None:
            place = held.gradient if transfer.what == What.REDUCE else held.weight
            yield from ((number, place(number)) for number in transfer.slices)
            return
        own = self.shards.gradient if transfer.what == What.REDUCE else self.shards.weight
        at = 0
        for number in transfer.slices:
            like = own(number)
            stop = at + like.numel() * like.element_size()
            yield number, payload[at:stop].view(like.dtype).view(like.shape)
            at = stop

    # -- work ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self, bucket: int) -> None:
        """Sum a bucket's slices over those who sent them in the order of device indices, into this device's own
        gradients: over their holders, or over islands, of which each has one to send its sum.

        Adding two numbers gives the same bits in either order, so only the sum before one's own is formed apart.
        """
        for number in self.program.buckets[self.device][bucket]:
            pieces = self._pieces.pop(number, {})
            own = self.shards.gradient(number)
            total: Tensor | None = None
            ours = False  # whether the sum may be changed: a neighbour's gradient may not
            for holder in sorted((*pieces, self.device)):
                term = own if holder == self.device else pieces[holder]
                if total is None:
                    total, ours = term, holder not in self.neighbours
                elif holder == self.device:
                    total, ours = own.add_(total), True
                else:
                    total, ours = (total.add_(term) if ours else total + term), True

    def norm(self) -> None:
        """This device's part of the squared norm: of what it updates."""
        self.squares = self.updater.sum_of_squares()

    def totals(self) -> Tensor:
        """(sum of squares, loss sum) over all devices, fp64; on the root, summed in the order of device indices. Other
        devices know only their own part until the total has come."""
        if self._totals is None:
            total = torch.tensor([self.squares, self.loss], dtype=torch.float64)
            if self.is_root:
                for _, value in sorted(self._norms.items()):
                    total += value
            self._totals = total
        return self._totals

    def update(self, bucket: int, step: int, total_steps: int) -> None:
        """Update a bucket by the global norm, which is the same number on all devices. Where it or the loss is not
        finite nothing is updated: with `skips` that is all, else NotFiniteError is raised."""
        squares, loss = self.totals().tolist()
        norm = math.sqrt(squares)
        if not math.isfinite(norm) or not math.isfinite(loss):
            if self.skips:
                return
            raise self._not_finite(norm, loss)
        if bucket <= 0:
            self.updater.updates += 1
        if bucket >= 0:
            self.updater.update(bucket, norm, step, total_steps)

    def _not_finite(self, norm: float, loss: float) -> NotFiniteError:
        table = self.shards.ownership
        own, summed = self._first_not_finite(sums=False), self._first_not_finite(sums=True)
        number = summed if own is None else own
        name = "" if number is None else table.parameters[table.slices[number].parameter].name
        what = f"the gradient norm is {norm}" if not math.isfinite(norm) else f"the loss is {loss}"
        where = f", by the gradient of {name}" if name else ""
        certain = own is not None or not math.isfinite(self.loss)
        alone = summed is not None and len(table.slices[summed].holders) == 1
        suspicion = 2 if certain or alone else 1 if name else 0
        return NotFiniteError(
            f"{what}{where}; lower the learning rate or look at the data", suspicion=suspicion
        )

    def _first_not_finite(self, *, sums: bool) -> int | None:
        """The first slice whose gradient is not finite here: of those that this device updates, sums by now, or
        or that its island added up here, or of its own part of the others."""
        transfers = (
            t for t in self.program.transfers if t.what == What.REDUCE_SCATTER and self.device in t.members
        )
        summed = {number for transfer in transfers for number in transfer.share(self.device)}
        for number, entry in enumerate(self.shards.ownership.slices):
            is_sum = entry.updater == self.device or number in summed
            mine = self.device in entry.holders and is_sum == sums
            if mine and not bool(torch.isfinite(self.shards.gradient(number)).all()):
                return number
        return None

    @torch.no_grad()
    def gather(self) -> None:
        """Put the new weights that have come into place."""
        for number, value in self._new.items():
            self.shards.weight(number).copy_(value)
        self._new.clear()
