"""AdamW on slices, the learning-rate schedule, and what both share with the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from hethub.program.ownership import Ownership
from hethub.specs.job import OptimizerSettings

__all__ = ["AdamW", "Updater", "adamw", "clip_scale", "decay_groups", "learning_rate"]


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then a cosine to `final_learning_rate_ratio` at the last step."""
    peak = settings.learning_rate
    if step < settings.warmup_steps:
        return peak * (step + 1) / settings.warmup_steps
    left = max(1, steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / left)
    low = settings.final_learning_rate_ratio
    return peak * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


def clip_scale(norm: float, clip_norm: float | None) -> float:
    """What gradients are multiplied by, as `torch.nn.utils.clip_grad_norm_` does."""
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))


def decay_groups(
    tensors: Mapping[str, list[Tensor]], matrices: set[str], settings: OptimizerSettings
) -> list[tuple[list[Tensor], float]]:
    """(tensors, weight decay) of named tensors: matrices decay, norm weights do not."""
    decayed = [t for name, ts in tensors.items() if name in matrices for t in ts]
    plain = [t for name, ts in tensors.items() if name not in matrices for t in ts]
    return [group for group in ((decayed, settings.weight_decay), (plain, 0.0)) if group[0]]


def adamw(
    tensors: Mapping[str, list[Tensor]], matrices: set[str], settings: OptimizerSettings
) -> torch.optim.AdamW:
    """torch's own optimizer, for the reference."""
    return torch.optim.AdamW(
        [{"params": ts, "weight_decay": decay} for ts, decay in decay_groups(tensors, matrices, settings)],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


class AdamW:
    """torch's AdamW function with its state held here.

    `torch.optim.AdamW` does the same with the same bits, and imports torch's compiler when it is made: a second of CPU
    in the start of every worker.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], settings: OptimizerSettings) -> None:
        """`groups` are (tensors, weight decay)."""
        self.groups = groups
        self.learning_rate = settings.learning_rate
        self._settings = settings
        self.state: dict[Tensor, tuple[Tensor, Tensor, Tensor]] = {}  # first and second moment, steps

    def step(self) -> None:
        """Update every tensor that has a gradient."""
        for tensors, weight_decay in self.groups:
            moved = [t for t in tensors if t.grad is not None]
            for tensor in moved:
                if tensor not in self.state:
                    self.state[tensor] = self._begin(tensor)
            states = [self.state[t] for t in moved]
            with torch.no_grad():
                torch_adamw(
                    moved,
                    [t.grad for t in moved if t.grad is not None],
                    [state[0] for state in states],
                    [state[1] for state in states],
                    [],
                    [state[2] for state in states],
                    amsgrad=False,
                    beta1=self._settings.beta1,
                    beta2=self._settings.beta2,
                    lr=self.learning_rate,
                    weight_decay=weight_decay,
                    eps=self._settings.epsilon,
                    maximize=False,
                )

    @staticmethod
    def _begin(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(tensor), torch.zeros_like(tensor), torch.tensor(0.0)

    def forget_gradients(self) -> None:
        """Let go of all gradients."""
        for tensors, _ in self.groups:
            for tensor in tensors:
                tensor.grad = None


class Updater:
    """The slices that one device updates: fp32 (fp64) masters, optimizer state, and their summed gradients.

    `weights` maps parameter names to this device's shards and `first` to the first index of the cut axis each
    begins at. Where weights are as wide as gradients the master is the weight itself, no copy.
    """

    def __init__(
        self,
        ownership: Ownership,
        device: int,
        weights: Mapping[str, Tensor],
        first: Mapping[str, int],
        wide: torch.dtype,
        settings: OptimizerSettings,
    ) -> None:
        self.ownership = ownership
        self.weights = weights
        self.first = first
        self.settings = settings
        self.owned = ownership.by_updater.get(device, ())
        self.masters: dict[int, Tensor] = {}
        named: dict[str, list[Tensor]] = {}
        for number in self.owned:
            view = self.view(number, weights).detach()
            master = view if view.dtype == wide else view.to(wide)
            self.masters[number] = master
            named.setdefault(ownership.parameters[ownership.slices[number].parameter].name, []).append(master)
        matrices = {p.name for p in ownership.parameters if len(p.shape) > 1}
        self.optimizer = AdamW(decay_groups(named, matrices, settings), settings) if named else None

    def view(self, number: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Slice `number` of tensors shaped like this device's shards."""
        entry = self.ownership.slices[number]
        parameter = self.ownership.parameters[entry.parameter]
        start = entry.start - self.first[parameter.name]
        return tensors[parameter.name].narrow(parameter.axis, start, entry.stop - entry.start)

    def sum_of_squares(self) -> float:
        """Of the gradients of all owned slices, in fp64."""
        total = 0.0
        for master in self.masters.values():
            if master.grad is not None:
                total += float(master.grad.double().square().sum())
        return total

    def update(self, norm: float, step: int, steps: int) -> None:
        """Clip by the global norm, step AdamW, write the new weights, forget the gradients."""
        if self.optimizer is None:
            return
        scale = clip_scale(norm, self.settings.clip_norm)
        self.optimizer.learning_rate = learning_rate(self.settings, step, steps)
        if scale != 1.0:
            for master in self.masters.values():
                if master.grad is not None:
                    master.grad.mul_(scale)
        self.optimizer.step()
        self.optimizer.forget_gradients()
        with torch.no_grad():
            for number, master in self.masters.items():
                view = self.view(number, self.weights)
                if view.data_ptr() != master.data_ptr():
                    view.copy_(master)
