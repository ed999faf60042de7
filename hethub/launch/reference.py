"""The single-process reference: the whole model in one piece, torch's own clipping, no groups, no program.

What every plan's training must equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hethub.cost.shapes import Parameter
from hethub.data.batches import Batches
from hethub.launch.model import StageModel
from hethub.launch.optimizer import adamw, learning_rate
from hethub.launch.weights import initial_weight
from hethub.specs.job import OptimizerSettings
from hethub.specs.layout import Share, Span
from hethub.specs.workload import Workload

__all__ = ["ReferenceRun", "train_reference"]


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """Loss and gradient norm (before clipping) of each step, final weights by name, held-out loss after training."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    weights: dict[str, npt.NDArray[np.generic]]
    held_out_loss: float | None


def train_reference(
    workload: Workload,
    batches: Batches,
    settings: OptimizerSettings,
    *,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    total_steps: int | None = None,
    held_out_rows: int = 0,
) -> ReferenceRun:
    """Train `steps` steps of a run of `total_steps` (default: all of them) on the CPU."""
    model = workload.model

    def initial(parameter: Parameter, span: Span) -> Tensor:
        return torch.from_numpy(initial_weight(parameter, span, model, seed))

    whole = StageModel(
        model,
        (0, model.layers + 2),
        Share.whole(model),
        sequence_length=workload.sequence_length,
        dtype=dtype,
        device=torch.device("cpu"),
        weights=initial,
    )
    matrices = {name for name, weight in whole.parameters.items() if weight.dim() > 1}
    optimizer = adamw({name: [weight] for name, weight in whole.parameters.items()}, matrices, settings)
    losses, norms = [], []
    for step in range(steps):
        inputs, targets = (
            torch.from_numpy(np.ascontiguousarray(a)) for a in batches.rows(step, 0, workload.global_batch)
        )
        loss = whole.forward(inputs, targets, torch.ones(len(inputs))) / targets.numel()
        loss.backward()
        limit = float("inf") if settings.clip_norm is None else settings.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(list(whole.parameters.values()), limit)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, steps if total_steps is None else total_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        norms.append(float(norm))
    held_out = None
    if held_out_rows:
        with torch.no_grad():
            inputs, targets = (
                torch.from_numpy(np.ascontiguousarray(a)) for a in batches.held_out_rows(0, held_out_rows)
            )
            held_out = float(whole.forward(inputs, targets, torch.ones(held_out_rows))) / targets.numel()
    weights = {name: weight.detach().numpy().copy() for name, weight in whole.parameters.items()}
    return ReferenceRun(tuple(losses), tuple(norms), weights, held_out)
