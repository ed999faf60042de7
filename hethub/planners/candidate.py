"""Candidates: priced pipelines with their micro-batches, such that all rows of the batch are done once."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hethub.planners.chain import Chain, Chains
from hethub.planners.seats import Crew
from hethub.planners.stage import Setting

__all__ = ["Candidate", "Entry", "Part", "chains_of", "divisors", "price", "ways"]


class Part(NamedTuple):
    """`copies` alike pipelines, micro-batches of `rows` rows."""

    crew: Crew
    rows: int
    copies: int


def ways(parts: Sequence[Part]) -> tuple[bool, ...]:
    """The ways to deal out groups that differ (`stage_major`): of pipelines that are all single ones there is one."""
    return (False, True) if any(part.copies > 1 for part in parts) else (False,)


class Entry(NamedTuple):
    """`repeat` alike pipelines with `micro_batches` each."""

    chain: Chain
    micro_batches: int
    repeat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A whole split in counts of devices. `seconds` is the closed form's step time, which is that of 1F1B whatever the
    `schedule`."""

    parts: tuple[Part, ...]
    entries: tuple[Entry, ...]
    stage_major: bool
    reach: int
    seconds: float
    schedule: str = "1f1b"

    @property
    def split_backward_seconds(self) -> float:
        """The closed form where backwards are split and gradients need not wait for weight parts on their way."""
        each = (e.chain.seconds(e.micro_batches) - e.chain.split_seconds for e in self.entries)
        return max(each) + self.tail_seconds

    @property
    def least_seconds(self) -> float:
        """Less than which no schedule takes, whatever gradients and weights take."""
        return max(e.chain.least_seconds(e.micro_batches) for e in self.entries)

    @property
    def unblocked_seconds(self) -> float:
        """About what a good schedule reaches where memory allows."""
        return max(e.chain.unblocked_seconds(e.micro_batches) for e in self.entries) + self.tail_seconds

    @property
    def tail_seconds(self) -> float:
        """Behind the last backwards: the longest of all pipelines', which wait for each other."""
        return max(e.chain.tail_seconds for e in self.entries)

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for candidates that are the same plan."""
        return (self.stage_major, self.schedule, self.split)

    @property
    def split(self) -> tuple[object, ...]:
        """Equal for candidates that differ at most in how their groups are dealt out, and in their schedule."""
        return tuple((e.chain.stages, e.chain.rows, e.micro_batches, e.repeat) for e in self.entries)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def chains_of(
    chains: Chains, parts: Sequence[Part], batch: int, *, stage_major: bool, reach: int
) -> list[Chain | None]:
    """Each part's pipeline as it stands beside the others, its layers divided; None where it does not fit."""
    pipelines = sum(part.copies for part in parts)
    used: dict[int, int] = {}  # devices of each pool
    for part in parts:
        for slot, count in part.crew:
            for seat in slot:
                each = count * seat.degree * seat.replicas
                used[seat.pool] = used.get(seat.pool, 0) + part.copies * each
    pools = tuple(sorted(used))
    near = tuple(pool for pool in pools if used[pool] <= chains.costs.pools[pool].node_size)
    found = []
    for part in parts:
        # The number is not settled yet: an even deal decides how deep stages may run ahead.
        deal = max(1, batch // (part.rows * pipelines))
        several = stage_major and part.copies > 1  # one pipeline is dealt out alike in both ways
        setting = Setting(part.copies, pipelines - part.copies, pools, deal, several, reach, near)
        found.append(chains.chain(part.crew, part.rows, setting))
    return found


def price(
    chains: Chains, parts: Sequence[Part], batch: int, *, stage_major: bool = False, reach: int = 1
) -> Candidate | None:
    """Divide the layers and the batch; None when some pipeline does not fit or has nothing to do, or the rows
    cannot be dealt."""
    priced = chains_of(chains, parts, batch, stage_major=stage_major, reach=reach)
    known = [chain for chain in priced if chain is not None]
    if len(known) < len(parts):
        return None
    counts = _deal(known, [part.copies for part in parts], batch)
    # An idle pipeline is none: it would be counted among those that share the updates.
    if counts is None or any(count < part.copies for count, part in zip(counts, parts, strict=True)):
        return None
    entries = []
    for chain, part, count in zip(known, parts, counts, strict=True):
        each, more = divmod(count, part.copies)
        for repeat, micro_batches in ((more, each + 1), (part.copies - more, each)):
            if repeat:
                entries.append(Entry(chain, micro_batches, repeat))
    seconds = max(e.chain.seconds(e.micro_batches) for e in entries)
    seconds += max(e.chain.tail_seconds for e in entries)
    return Candidate(
        parts=tuple(parts), entries=tuple(entries), stage_major=stage_major, reach=reach, seconds=seconds
    )


def _deal(chains: Sequence[Chain], copies: Sequence[int], batch: int) -> list[int] | None:
    """Micro-batches of each part's copies together: one by one to the pipeline that would then end first; None where
    the rows do not come out even."""
    if len(chains) == 1:
        return [batch // chains[0].rows] if batch % chains[0].rows == 0 else None
    counts = [0] * len(chains)
    queue = [(chain.seconds(1), i) for i, chain in enumerate(chains)]
    heapq.heapify(queue)
    left = batch
    while left and queue:
        _, i = heapq.heappop(queue)
        if chains[i].rows > left:
            continue
        counts[i] += 1
        left -= chains[i].rows
        heapq.heappush(queue, (chains[i].seconds(counts[i] // copies[i] + 1), i))
    return counts if not left else _evened(chains, counts, left)


def _evened(chains: Sequence[Chain], counts: list[int], left: int) -> list[int] | None:
    """Take one micro-batch from a part so that another's fill what is then left."""
    for i, giver in enumerate(chains):
        for j, taker in enumerate(chains):
            more = left + giver.rows
            if i != j and counts[i] and more % taker.rows == 0:
                return [n - (k == i) + (k == j) * (more // taker.rows) for k, n in enumerate(counts)]
    return None
