"""Micro-batches on their way through a stage: what one device holds of each between its forward and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hethub.launch.gradients import Deferred, beginning
from hethub.launch.model import StageModel
from hethub.launch.tally import Held, StorageTally
from hethub.specs.layout import Span

__all__ = ["Flight"]


@dataclass(slots=True)
class Flight:
    """One micro-batch in one stage, run piece by piece: `pieces` are layer ranges, and the graph of autograd ends at
    each piece's input, so that a piece's backward can be an action of its own.

    `entry` is the stage's input: token ids (B, S), or activations (B, s, D) with s tokens of this rank. `loss_scale`
    is what the loss's gradient is, in the last stage. `held` are message buffers that tensors of the flight lie in.
    Where there is a `tally`, it counts what the flight keeps.
    """

    stage: StageModel
    pieces: Sequence[Span]
    entry: Tensor
    targets: Tensor | None
    weights: Tensor | None
    loss_scale: float
    tally: StorageTally | None = None
    held: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor | None] = field(default_factory=list)
    cells: list[Any] = field(default_factory=list)  # attention cores to recompute
    deferred: dict[int, list[Deferred]] = field(default_factory=dict)  # weight gradients to come, by piece
    value: Tensor | None = None  # the latest output, without graph
    _counted: dict[tuple[str, int], Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._count("entry", 0, *(t for t in (self.entry, self.targets, self.weights) if t is not None))

    def _count(self, what: str, piece: int, *tensors: Tensor) -> None:
        """Count tensors for as long as the flight keeps them as `what`; no tensors end it."""
        if self.tally is not None:
            old = self._counted.pop((what, piece), None)
            if tensors:
                self._counted[what, piece] = self.tally.hold(tensors)
            if old is not None:
                old.release()

    def _saving(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.tally is None else self.tally.saving()

    def forward(self, pieces: Sequence[int], *, keep: bool) -> None:
        """Run these pieces in order; `keep` builds the graph that `backward` needs."""
        with torch.set_grad_enabled(keep), self._saving() if keep else nullcontext():
            for piece in pieces:
                x = self.entry if piece == 0 else self.value
                assert x is not None
                if keep and x.is_floating_point():
                    # The stage's own input needs a gradient only where a stage before waits for it.
                    x = x.detach().requires_grad_()
                output = self.stage.forward_layers(
                    self.pieces[piece],
                    x,
                    self.targets,
                    self.weights,
                    loss_scale=self.loss_scale if keep else None,
                    cells=self.cells if keep else None,
                )
                if keep:
                    self.inputs.append(x)
                    self.outputs.append(output)
                    self._count("output", piece, output)
                self.value = output.detach()

    def recompute(self) -> None:
        """Bring back what the forward did not keep: all of it, or the attention cores."""
        if not self.outputs:
            self.forward(range(len(self.pieces)), keep=True)
            self.value = None
        with self._saving():
            for cell in self.cells:
                cell.fill()

    def backward(self, piece: int, gradient: Tensor | None, *, split: bool) -> None:
        """Backward of one piece; `gradient` is its output's, None in front of the loss and between pieces.

        With `split` weight gradients are noted for `settle`, else they are added at once.
        """
        output = self.outputs[piece]
        assert output is not None
        if gradient is None:
            last = piece == len(self.pieces) - 1
            gradient = torch.ones_like(output) if last else self.inputs[piece + 1].grad
        sink = self.stage.sink
        assert sink is not None and gradient is not None
        sink.deferred = self.deferred.setdefault(piece, []) if split else None
        beginning(output, gradient).backward()
        sink.deferred = None
        self.outputs[piece] = None
        self._count("output", piece)
        if split:
            operands = [t for item in self.deferred[piece] for t in (item.gradient, item.inputs)]
            self._count("operands", piece, *operands)
        if piece + 1 < len(self.pieces):
            self.inputs[piece + 1].grad = None
            self._count("gradient", piece + 1)
        passed = self.inputs[piece].grad
        if passed is not None:
            self._count("gradient", piece, passed)

    @property
    def input_gradient(self) -> Tensor:
        """Of the stage's input, after the backward of piece 0."""
        gradient = self.inputs[0].grad
        assert gradient is not None
        return gradient

    def settle(self, piece: int) -> None:
        """Take the weight gradients that a split backward noted."""
        assert self.stage.sink is not None
        self.stage.sink.settle(self.deferred.pop(piece))
        self._count("operands", piece)

    def land(self) -> None:
        """The micro-batch is done with the stage; what is sent on of it is the sender's to count."""
        for counted in self._counted.values():
            counted.release()
        self._counted.clear()
