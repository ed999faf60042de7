"""The unigram model: what a trained model must beat."""

from __future__ import annotations

import numpy as np

from hethub.data.batches import Batches

__all__ = ["unigram_loss"]


def unigram_loss(batches: Batches, rows: int) -> float:
    """Nats per token of a unigram model on the targets of held-out rows [0, rows).

    Its probabilities are the token counts of the training part, each plus one (Laplace), so that no token that
    training never saw is impossible.
    """
    _, targets = batches.held_out_rows(0, rows)
    size = int(max(batches.train_part.max(), targets.max())) + 1
    counts = np.bincount(np.asarray(batches.train_part, dtype=np.int64), minlength=size) + 1
    return float(-np.log(counts / counts.sum())[targets].mean())
