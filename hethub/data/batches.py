"""Batches: which tokens a row of a step holds, as a pure function of (seed, step, row).

The corpus is cut in two: the training part and, behind it, the held-out tail. Each is cut into windows of S
inputs: window w reads the S + 1 tokens of its part from w S on; its targets are its inputs moved on by one.
Every epoch visits every training window once, in an order of its own.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hethub.errors import InputError

__all__ = ["Batches", "Rows"]

Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""(inputs, targets), each (rows, sequence)."""

_KEPT_EPOCHS = 4  # a batch may straddle two, in training and in a comparison that runs beside it


class Batches:
    """The rows of every step and of the held-out part."""

    def __init__(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        *,
        sequence_length: int,
        global_batch: int,
        seed: int,
        held_out: float,
    ) -> None:
        """Cut `tokens`, shape (tokens,), of which the last share `held_out` in [0, 1) is never trained on.

        Raises InputError when either part is too short for one window, ValueError on arguments out of range.
        """
        if sequence_length < 1 or global_batch < 1 or not 0 <= held_out < 1 or not 0 <= seed < 2**64:
            raise ValueError(f"out of range: {sequence_length=} {global_batch=} {held_out=} {seed=}")
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.seed = seed
        held_out_tokens = round(len(tokens) * held_out)
        self.training_part = tokens[: len(tokens) - held_out_tokens]
        self.held_out_part = tokens[len(tokens) - held_out_tokens :]
        for part, windows in (("training", self.train_windows), ("held-out", self.held_out_windows)):
            if windows < 1 and (part == "training" or held_out > 0):
                raise InputError(self._too_short(part, held_out))

    def _too_short(self, part: str, held_out: float) -> str:
        there = self.train_tokens if part == "training" else self.held_out_tokens
        return (
            f"data.files: the {part} part has {there} tokens of the corpus's "
            f"{self.train_tokens + self.held_out_tokens} (held_out is {held_out:g}), and one sequence of "
            f"{self.sequence_length} needs {self.sequence_length + 1}. Give more text or change held_out or "
            "sequence_length."
        )

    @property
    def train_tokens(self) -> int:
        """Tokens of the training part."""
        return len(self.training_part)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of the held-out tail."""
        return len(self.held_out_part)

    @property
    def train_windows(self) -> int:
        """Rows of one epoch."""
        return max(0, self.train_tokens - 1) // self.sequence_length

    @property
    def held_out_windows(self) -> int:
        """Rows of the held-out part."""
        return max(0, self.held_out_tokens - 1) // self.sequence_length

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Return rows [start, stop) of the global batch of `step`. Raises ValueError outside the batch."""
        return self._cut(self.training_part, self.sample_ids(step, start, stop))

    def sample_ids(self, step: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the training windows of rows [start, stop) of `step`. Raises as `rows` does."""
        if step < 0 or not 0 <= start <= stop <= self.global_batch:
            raise ValueError(f"step {step} rows [{start}, {stop}) are not in a batch of {self.global_batch}")
        samples = step * self.global_batch + np.arange(start, stop, dtype=np.int64)
        epochs, places = np.divmod(samples, self.train_windows)
        windows = np.empty_like(samples)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = _order(self.seed, int(epoch), self.train_windows)[places[chosen]]
        return windows

    def held_out_rows(self, start: int, stop: int) -> Rows:
        """Return held-out windows [start, stop), in the corpus's order. Raises InputError past the last."""
        if not 0 <= start <= stop:
            raise ValueError(f"[{start}, {stop}) is not a range of rows")
        if stop > self.held_out_windows:
            raise InputError(
                f"evaluate.rows: {stop} rows are asked for, the held-out part has {self.held_out_windows} of "
                f"{self.sequence_length} tokens. Ask for fewer, or give more text or a larger held_out."
            )
        return self._cut(self.held_out_part, np.arange(start, stop, dtype=np.int64))

    def _cut(self, part: npt.NDArray[np.unsignedinteger], windows: npt.NDArray[np.int64]) -> Rows:
        S = self.sequence_length
        positions = windows[:, None] * S + np.arange(S + 1)  # (rows, sequence + 1)
        cut = part[positions].astype(np.int64)
        return np.ascontiguousarray(cut[:, :-1]), np.ascontiguousarray(cut[:, 1:])


@lru_cache(maxsize=_KEPT_EPOCHS)
def _order(seed: int, epoch: int, windows: int) -> npt.NDArray[np.int64]:
    """Return the windows in the order of `epoch`, a permutation of range(windows).

    Sorting raw Philox words and not `Generator.permutation`: numpy promises that the former stay the same
    in all its versions, and a run must resume with the same data after an upgrade.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(windows)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
