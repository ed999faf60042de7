"""Which tokens stand in which row of which step: a pure function of (seed, step, row)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hethub.errors import InputError

__all__ = ["Batches"]

Rows = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class Batches:
    """Windows of `sequence_length` + 1 tokens, in an order that any plan and any resumed run agree on.

    The last `held_out` share of the tokens is kept for evaluation. Sample number step x global_batch + row falls into
    epoch number // train_windows, whose order is a permutation of the windows drawn from (seed, epoch) alone.
    """

    def __init__(
        self,
        tokens: npt.NDArray[Any],
        *,
        sequence_length: int,
        global_batch: int,
        seed: int,
        held_out: float,
    ) -> None:
        """Raises InputError when the training part holds no window, or a wanted held-out part none."""
        self._tokens = tokens
        self.sequence_length = sequence_length
        self.global_batch = global_batch
        self.seed = seed
        self.held_out_tokens = int(len(tokens) * held_out)
        self.train_tokens = len(tokens) - self.held_out_tokens
        self.train_windows = max(0, (self.train_tokens - 1) // sequence_length)
        self.held_out_windows = max(0, (self.held_out_tokens - 1) // sequence_length)
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        if self.train_windows == 0 or (held_out > 0 and self.held_out_windows == 0):
            part, there = ("held-out", self.held_out_tokens) if self.train_windows else ("training", self.train_tokens)
            raise InputError(
                f"data: the {part} part has {there} tokens, one row needs {sequence_length + 1}. "
                "Give more text or a shorter sequence_length."
            )

    @property
    def train_part(self) -> npt.NDArray[Any]:
        """The training tokens (n,)."""
        return self._tokens[: self.train_tokens]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            if len(self._orders) > 2:
                self._orders.pop(min(self._orders))
            key = np.array([self.seed, epoch], dtype=np.uint64)
            self._orders[epoch] = np.random.Generator(np.random.Philox(key=key)).permutation(self.train_windows)
        return self._orders[epoch]

    def sample_ids(self, step: int, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Window numbers (n,) of rows [start, stop) of a step."""
        samples = step * self.global_batch + np.arange(start, stop, dtype=np.int64)
        epochs, places = np.divmod(samples, self.train_windows)
        return np.array([self._order(int(e))[p] for e, p in zip(epochs, places, strict=True)], dtype=np.int64)

    def rows(self, step: int, start: int, stop: int) -> Rows:
        """Inputs and targets, each (stop - start, sequence_length), of rows [start, stop) of a step's global batch."""
        return self._windows(self.sample_ids(step, start, stop) * self.sequence_length)

    def held_out_rows(self, start: int, stop: int) -> Rows:
        """Inputs and targets of held-out windows [start, stop), in text order. Raises InputError past the last one."""
        if stop > self.held_out_windows:
            raise InputError(
                f"data: {stop} held-out rows are wanted, there are {self.held_out_windows}. "
                "Lower `evaluate.rows` or raise `data.held_out`."
            )
        return self._windows(self.train_tokens + np.arange(start, stop, dtype=np.int64) * self.sequence_length)

    def _windows(self, starts: npt.NDArray[np.int64]) -> Rows:
        index = starts[:, None] + np.arange(self.sequence_length + 1)
        taken = self._tokens[index].astype(np.int64)
        return taken[:, :-1], taken[:, 1:]
