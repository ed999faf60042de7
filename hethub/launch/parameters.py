"""The parameter lane of one device: gradients to their updaters, the norm, the update, new weights to their holders."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hethub.launch.optimizer import Updater, joined
from hethub.program.actions import Program, Transfer, What
from hethub.specs.job import OptimizerSettings

__all__ = ["ParameterLane"]


class ParameterLane:
    """What a device holds of the parameters, and what the actions of the parameter lane do with it.

    `weights` and `gradients` (wide) map parameter names to this device's shards, `first` to the first index of the cut
    axis that each begins at.
    """

    def __init__(
        self,
        program: Program,
        device: int,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        first: Mapping[str, int],
        settings: OptimizerSettings,
    ) -> None:
        self.program = program
        self.device = device
        self.weights = weights
        self.gradients = gradients
        self.updater = Updater(
            program.ownership, program.buckets.get(device, ()), weights, gradients, first, settings
        )
        self.is_root = device == program.layout.used[0]
        self._pieces: dict[int, dict[int, Tensor]] = defaultdict(dict)  # slice -> sender -> gradient
        self._new: dict[int, Tensor] = {}  # slice -> new weight
        self._norms: dict[int, Tensor] = {}  # sender -> sum of squares and loss
        self._totals: Tensor | None = None
        self._places: dict[tuple[What, tuple[int, ...]], list[Tensor]] = {}  # of what messages carry
        self.loss = 0.0
        self.squares = 0.0

    def begin(self) -> None:
        """Forget the sums of the step before."""
        self._norms.clear()
        self._totals = None
        self.loss = self.squares = 0.0

    # -- messages --------------------------------------------------------------------------------------------------

    def outgoing(self, transfer: Transfer) -> Sequence[Tensor]:
        """The tensors that a message carries, one after the other."""
        if transfer.what in (What.REDUCE, What.WEIGHTS):
            key = (transfer.what, transfer.slices)
            if key not in self._places:
                held = self.gradients if transfer.what == What.REDUCE else self.weights
                self._places[key] = joined([self.updater.view(n, held).detach() for n in transfer.slices])
            return self._places[key]
        if transfer.what == What.NORM:
            return [torch.tensor([self.squares, self.loss], dtype=torch.float64)]
        return [self.totals()]

    def keep(self, transfer: Transfer, payload: Tensor) -> None:
        """Take a received payload (uint8, the device's own from now on)."""
        if transfer.what in (What.NORM, What.TOTAL):
            values = payload.view(torch.float64)
            if transfer.what == What.NORM:
                self._norms[transfer.source] = values
            else:
                self._totals = values
            return
        wanted = self.gradients if transfer.what == What.REDUCE else self.weights
        at = 0
        for number in transfer.slices:
            view = self.updater.view(number, wanted)
            stop = at + view.numel() * view.element_size()
            piece = payload[at:stop].view(view.dtype).view(view.shape)
            at = stop
            if transfer.what == What.REDUCE:
                self._pieces[number][transfer.source] = piece
            else:
                self._new[number] = piece

    # -- work ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self, bucket: int) -> None:
        """Sum a bucket's slices over their holders in the order of device indices, into this device's own gradients.

        Adding two numbers gives the same bits in either order, so only the sum before one's own is formed apart.
        """
        for number in self.program.buckets[self.device][bucket]:
            pieces = self._pieces.pop(number, {})
            own = self.updater.view(number, self.gradients)
            total: Tensor | None = None
            for holder in self.program.ownership.slices[number].holders:
                if holder == self.device:
                    total = own if total is None else own.add_(total)
                else:
                    total = pieces[holder] if total is None else total.add_(pieces[holder])

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
        """Update a bucket by the global norm. Raises FloatingPointError where that is not finite."""
        norm = math.sqrt(float(self.totals()[0]))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {norm}; lower the learning rate or look at the data"
            )
        if bucket >= 0:
            self.updater.update(bucket, norm, step, total_steps)

    @torch.no_grad()
    def gather(self) -> None:
        """Put the new weights that have come into place."""
        for number, value in self._new.items():
            self.updater.view(number, self.weights).copy_(value)
        self._new.clear()
