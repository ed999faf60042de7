"""AdamW on slices, the learning-rate schedule, and what both share with the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from hethub.launch.shards import Shards
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
    tensors: Mapping[str, list[Tensor]],
    matrices: set[str],
    settings: OptimizerSettings,
) -> torch.optim.AdamW:
    """torch's own optimizer, for the reference."""
    return torch.optim.AdamW(
        [{"params": ts, "weight_decay": decay} for ts, decay in decay_groups(tensors, matrices, settings)],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
    )


class AdamW:
    """torch's AdamW function, fused into one kernel a group, with its state held here.

    `torch.optim.AdamW` imports torch's compiler when it is made: a second of CPU in the start of every worker. Fused is
    3 times as fast on a CPU as tensor by tensor; torch 2.13's takes contiguous tensors only, and computes wrongly on
    others without a word.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Tensor], float]], settings: OptimizerSettings) -> None:
        """`groups` are (contiguous tensors, weight decay); each tensor's `.grad` is there at every step."""
        self.groups = groups
        self._settings = settings
        tensors = [tensor for group, _ in groups for tensor in group]
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("fused AdamW takes contiguous tensors only")
        self.first_moments = {t: torch.zeros_like(t) for t in tensors}
        self.second_moments = {t: torch.zeros_like(t) for t in tensors}
        self._steps = {t: torch.zeros((), dtype=torch.float32, device=t.device) for t in tensors}

    def resume(self, updates: int) -> None:
        """Go on as after so many steps; the moments are set by whoever has them."""
        for steps in self._steps.values():
            steps.fill_(updates)

    @torch.no_grad()
    def step(self, learning_rate: float, scale: float) -> None:
        """Update every tensor by its gradient x `scale`."""
        for tensors, weight_decay in self.groups:
            gradients = [t.grad for t in tensors if t.grad is not None]
            # The kernel scales in passing, by an fp32 factor: too coarse for fp64.
            inside = scale != 1.0 and tensors[0].dtype == torch.float32
            if scale != 1.0 and not inside:
                torch._foreach_mul_(gradients, scale)
            torch_adamw(
                list(tensors),
                gradients,
                [self.first_moments[t] for t in tensors],
                [self.second_moments[t] for t in tensors],
                [],
                [self._steps[t] for t in tensors],
                fused=True,
                grad_scale=torch.tensor(1 / scale, device=tensors[0].device) if inside else None,
                found_inf=torch.zeros((), device=tensors[0].device) if inside else None,
                amsgrad=False,
                beta1=self._settings.beta1,
                beta2=self._settings.beta2,
                lr=learning_rate,
                weight_decay=weight_decay,
                eps=self._settings.epsilon,
                maximize=False,
            )


def joined(views: Sequence[Tensor]) -> list[Tensor]:
    """The same elements in the same order, neighbours in one storage as one flat tensor."""
    found: list[Tensor] = []
    for view in views:
        last = found[-1] if found else None
        if not view.is_contiguous():
            found.append(view)
        elif (
            last is not None
            and last.is_contiguous()
            and last.data_ptr() + last.numel() * last.element_size() == view.data_ptr()
            and last.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        ):
            found[-1] = last.as_strided((last.numel() + view.numel(),), (1,))
        else:
            found.append(view.view(-1))
    return found


class Updater:
    """The slices that one device updates: fp32 (fp64) masters, optimizer state, and their summed gradients.

    `weights` and `gradients` map parameter names to this device's shards and their wide gradients, `first` to the
    first index of the cut axis each begins at; `buckets` are the slices by the order of their update. Where a weight's
    slice is contiguous and as wide as its gradient the master is the weight itself, no copy.
    """

    def __init__(
        self,
        shards: Shards,
        buckets: Sequence[Sequence[int]],
        settings: OptimizerSettings,
    ) -> None:
        self.shards = shards
        self.settings = settings
        self.buckets = buckets
        self.updates = 0  # done so far; alike on all devices
        self.owned = tuple(number for bucket in buckets for number in bucket)
        self.masters: dict[int, Tensor] = {}
        self._apart: set[int] = set()  # slices whose gradient is copied to be contiguous
        for number in self.owned:
            gradient = shards.gradient(number)
            view = shards.weight(number)
            if not gradient.is_contiguous():
                gradient = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device)
                self._apart.add(number)
            alike = view.dtype == gradient.dtype and view.is_contiguous()
            master = view if alike else view.to(gradient.dtype, copy=True).contiguous()
            master.grad = gradient
            self.masters[number] = master

        self._pieces = joined([self._gradient(number) for number in self.owned])
        self.optimizers = [self._optimizer(bucket) for bucket in buckets]

    def _optimizer(self, bucket: Sequence[int]) -> AdamW:
        named: dict[str, list[Tensor]] = {}
        parameters = self.shards.ownership.parameters
        for number in bucket:
            name = parameters[self.shards.ownership.slices[number].parameter].name
            named.setdefault(name, []).append(self.masters[number])
        matrices = {p.name for p in parameters if len(p.shape) > 1}
        return AdamW(decay_groups(named, matrices, self.settings), self.settings)

    def resume(self, updates: int) -> None:
        """Go on as after so many updates; masters and moments are set by whoever has them."""
        self.updates = updates
        for optimizer in self.optimizers:
            optimizer.resume(updates)

    def sum_of_squares(self) -> float:
        """Of the summed gradients of all owned slices, added up in fp64."""
        for number in self._apart:
            self._gradient(number).copy_(self.shards.gradient(number))
        if not self._pieces:
            return 0.0
        norms = torch.stack([torch.linalg.vector_norm(piece) for piece in self._pieces])
        return math.fsum(norm**2 for norm in norms.tolist())  # one wait for an accelerator, not one a piece

    def _gradient(self, number: int) -> Tensor:
        gradient = self.masters[number].grad
        assert gradient is not None
        return gradient

    @torch.no_grad()
    def update(self, bucket: int, norm: float, step: int, steps: int) -> None:
        """Clip a bucket by the global norm, step AdamW, write the new weights."""
        scale = clip_scale(norm, self.settings.clip_norm)
        self.optimizers[bucket].step(learning_rate(self.settings, step, steps), scale)
        for number in self.buckets[bucket]:
            view, master = self.shards.weight(number), self.masters[number]
            if view.data_ptr() != master.data_ptr():
                view.copy_(master)
