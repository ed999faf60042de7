"""Initial weights as a pure function of (seed, parameter name): any rank of any plan builds the same values.

A weight is made in blocks of fixed width along its cut axis, each from its own counter-based generator, so that a
rank makes only the blocks that its share touches.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

from hethub.cost.shapes import Parameter
from hethub.specs.layout import Span
from hethub.specs.workload import Model

__all__ = ["initial_weight"]

_BLOCK = 64  # indices of the cut axis per generator; part of the definition of the weights
_STD = 0.02


def _std(parameter: Parameter, model: Model) -> float:
    """0.02, and less for the two projections into the residual stream (Radford et al., GPT-2: 1/sqrt(2 layers))."""
    residual = parameter.name.endswith(("o_proj.weight", "down_proj.weight"))
    return _STD / math.sqrt(2 * model.layers) if residual else _STD


def initial_weight(parameter: Parameter, span: Span, model: Model, seed: int) -> npt.NDArray[np.float64]:
    """Elements [start, stop) of the parameter's cut axis, all of its other axes.

    Norm weights are ones; all else is normal with mean 0.
    """
    start, stop = span
    shape = list(parameter.shape)
    shape[parameter.axis] = stop - start
    if len(parameter.shape) == 1:
        return np.ones(shape)
    digest = hashlib.sha256(f"{seed}:{parameter.name}".encode()).digest()
    key = int.from_bytes(digest[:8], "little")
    std = _std(parameter, model)
    pieces = []
    for block in range(start // _BLOCK, (stop + _BLOCK - 1) // _BLOCK):
        first = block * _BLOCK
        last = min(first + _BLOCK, parameter.shape[parameter.axis])
        shape[parameter.axis] = last - first
        values = np.random.Generator(np.random.Philox(key=[key, block])).standard_normal(shape)
        cut = slice(max(start, first) - first, min(stop, last) - first)
        pieces.append(values[cut] if parameter.axis == 0 else values[:, cut])
    return np.asarray(np.concatenate(pieces, axis=parameter.axis) * std)
