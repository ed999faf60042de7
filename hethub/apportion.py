"""Whole shares by the largest remainder (Hamilton's method): rows to replicas, heads to ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["apportion"]


def apportion(total: int, weights: Sequence[float], minimum: int = 0) -> list[int]:
    """Split `total` into whole shares near `weights`, each at least `minimum`; they add up exactly.

    Every share is the floor or the ceiling of its quota of what the minima leave; ties go to the earlier
    share, so that equal input gives equal output. Raises ValueError when the minima alone exceed `total`,
    when there is no weight, or when a weight is negative, not finite, or all are 0.
    """
    left = total - minimum * len(weights)
    if not weights or minimum < 0 or left < 0:
        raise ValueError(f"{total} cannot be split into {len(weights)} shares of at least {minimum}")
    # scaled by the largest first, so that neither the sum nor a product overflows
    largest = max(weights)
    if not all(math.isfinite(w) and w >= 0 for w in weights) or largest == 0:
        raise ValueError(f"weights must be finite, not negative and not all 0: {list(weights)}")
    scaled = [w / largest for w in weights]
    whole = sum(scaled)
    quotas = [left * w / whole for w in scaled]
    shares = [math.floor(quota) for quota in quotas]
    rest = left - sum(shares)
    by_remainder = sorted(range(len(weights)), key=lambda i: (shares[i] - quotas[i], i))
    for i in by_remainder[:rest]:
        shares[i] += 1
    return [minimum + share for share in shares]
