"""The unigram model: token frequencies alone, the least that a trained model must beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hethub.data.batches import Batches

__all__ = ["unigram_loss"]

_PIECE = 2**22  # tokens counted at a time, so that a mapped corpus is never copied whole


def unigram_loss(batches: Batches, rows: int, vocab_size: int | None = None) -> float:
    """Return the loss, in nats per token, of a unigram model on the targets of held-out rows [0, rows).

    p(token) = (its count in the training part + 1) / (tokens of the training part + vocab_size). Without a
    `vocab_size` it is the smallest that holds the corpus: its largest token and one.
    Raises InputError when there are fewer held-out rows, ValueError when `rows` is less than 1 or a token
    does not fit `vocab_size`.
    """
    if rows < 1:
        raise ValueError(f"a loss over {rows} rows")
    _, targets = batches.held_out_rows(0, rows)
    if vocab_size is None:
        vocab_size = 1 + max(_largest(batches.training_part), _largest(batches.held_out_part))
    counts = _counts(batches.training_part, vocab_size)
    wanted = _counts(targets.reshape(-1), vocab_size)
    log_p = np.log((counts + 1) / (counts.sum() + vocab_size))
    return float(-(wanted * log_p).sum() / targets.size)


def _largest(tokens: npt.NDArray[np.integer]) -> int:
    return max(int(tokens[i : i + _PIECE].max()) for i in range(0, len(tokens), _PIECE))


def _counts(tokens: npt.NDArray[np.integer], vocab_size: int) -> npt.NDArray[np.int64]:
    """Return how often each token occurs, shape (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for first in range(0, len(tokens), _PIECE):
        piece = np.bincount(tokens[first : first + _PIECE], minlength=vocab_size)
        if len(piece) > vocab_size:
            raise ValueError(f"token {len(piece) - 1} is beyond vocab_size {vocab_size}")
        counts += piece
    return counts
