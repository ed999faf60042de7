"""Where weight gradients go: wide buffers that backward adds into, at once or later."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hethub.launch.heap import Allocate, in_private

__all__ = ["Deferred", "Packed", "WeightGradients", "add_product", "beginning", "wide_dtype"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over weights of `dtype` are taken in: fp64 stays, all else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def add_product(buffer: Tensor, gradient: Tensor, inputs: Tensor) -> None:
    """buffer (outputs, inputs) += gradient (T, outputs)^T x inputs (T, inputs), in one go where dtypes allow."""
    if gradient.dtype == buffer.dtype:
        buffer.addmm_(gradient.t(), inputs)
    else:
        buffer.add_(gradient.t() @ inputs)


class _Beginning(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return torch.ones((), dtype=output.dtype, device=output.device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        gradient: Tensor = ctx.gradient
        return gradient, None


def beginning(output: Tensor, gradient: Tensor) -> Tensor:
    """A number whose gradient by `output` is `gradient`: where a backward begins in the middle of the model.

    To hand `gradient` to torch.autograd itself imports sympy (torch 2.13): half a second of CPU in every worker's first
    step.
    """
    with torch.enable_grad():  # inside another backward it is off
        number: Tensor = _Beginning.apply(output, gradient)
    return number


class Packed(Protocol):
    """A stage: its weights by name, and which of them lie one after the other in one storage."""

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def packs(self) -> Sequence[tuple[str, ...]]: ...  # noqa: D102


class Deferred(NamedTuple):
    """A weight gradient still to be taken: of a product, `gradient` (T, outputs) and `inputs` (T, inputs); of a
    table's rows, `gradient` (T, D) and the row numbers `inputs` (T,)."""

    names: tuple[str, ...]
    gradient: Tensor
    inputs: Tensor


class WeightGradients:
    """A sink for the weight gradients of some stages of one device.

    `buffers` holds one accumulation buffer a parameter, shaped like this device's shard, in fp32 (fp64 where weights
    are fp64); set to zero by whoever reads them. With `stage.sink` set to a sink, backward adds into the buffers and
    leaves `.grad` alone: no temporary of a weight's size, no second pass to accumulate it. While `deferred` is a list,
    the products of weight gradients are appended to it instead, so that backward yields input gradients only; `settle`
    takes them later. Norm weights' gradients fall out of the input gradient's work and are never deferred.
    """

    def __init__(self, stages: Iterable[Packed], allocate: Allocate = in_private) -> None:
        """`allocate` gives the zeros that they lie in."""
        self._allocate = allocate
        self.buffers: dict[str, Tensor] = {}
        self.deferred: list[Deferred] | None = None
        self._packs: dict[tuple[str, ...], Tensor] = {}
        self._arenas = [arena for arena in map(self._add_stage, stages) if len(arena)]

    def _add_stage(self, stage: Packed) -> Tensor:
        """All buffers of a stage one after the other, in the order of its packs, so that neighbours can be sent as
        one."""
        shapes = {}
        for names in stage.packs:
            if names not in self._packs:
                weights = [stage.parameters[name] for name in names]
                shapes[names] = (sum(len(w) for w in weights), *weights[0].shape[1:])
        some = next(iter(stage.parameters.values()))
        sizes = [math.prod(shape) for shape in shapes.values()]
        arena = self._allocate(sum(sizes), wide_dtype(some.dtype), some.device)
        for (names, shape), flat in zip(shapes.items(), arena.split(sizes), strict=True):
            pack = self._packs[names] = flat.view(shape)
            rows = [len(stage.parameters[name]) for name in names]
            self.buffers.update(zip(names, pack.split(rows), strict=True))
        return arena

    def product(self, names: tuple[str, ...], gradient: Tensor, inputs: Tensor) -> None:
        """Take gradient^T x inputs as the gradient of a pack (outputs, inputs), or note it for later."""
        self._take(Deferred(names, gradient, inputs))

    def rows(self, name: str, gradient: Tensor, rows: Tensor) -> None:
        """Add gradient (T, D) to the rows (T,) of a table, or note it for later."""
        self._take(Deferred((name,), gradient, rows))

    def vector(self, name: str, gradient: Tensor) -> None:
        """Add a norm weight's gradient."""
        self.buffers[name].add_(gradient)

    def settle(self, deferred: list[Deferred]) -> None:
        """Take every noted gradient in its order. The list is emptied as it goes, so each item's tensors are freed."""
        deferred.reverse()
        while deferred:
            self._settle(deferred.pop())

    def clear(self) -> None:
        """Set all buffers to zero."""
        torch._foreach_zero_(self._arenas)

    def _take(self, item: Deferred) -> None:
        if self.deferred is None:
            self._settle(item)
        else:
            self.deferred.append(item)

    def _settle(self, item: Deferred) -> None:
        buffer = self._packs[item.names]
        if not item.inputs.is_floating_point():
            buffer.index_add_(0, item.inputs, item.gradient.to(buffer.dtype))
        else:
            add_product(buffer, item.gradient, item.inputs)
