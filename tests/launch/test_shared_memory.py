"""Parameters that are read where they lie; that training is the same is test_parity's to show.

Seeded bugs that parity and these tests were seen to catch: a neighbour's shard taken to begin at 0, a sum formed in the
neighbour's own gradients (its process would end: they are mapped read only), a heap taken for another's.
"""

from __future__ import annotations

import os

import pytest
import torch

from hethub.launch.heap import Heap
from hethub.launch.shards import Shards
from hethub.launch.shared_memory import describe, look_at
from hethub.program.ownership import Ownership
from tests.launch.pool import Pool
from tests.plan_strategies import NAMED_PLANS

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no memfd_create")
_CPU = torch.device("cpu")


def _held(heap: Heap) -> Shards:
    weights, gradients = (heap.allocate(6, torch.float64, _CPU).view(3, 2) for _ in range(2))
    weights.copy_(torch.arange(6).view(3, 2))
    return Shards(Ownership((), ()), {"w": weights}, {"w": gradients}, {"w": 4})


def test_what_another_process_holds_is_seen_as_it_changes() -> None:
    heap = Heap()
    held = _held(heap)
    found = look_at(held.ownership, describe(heap, held))
    heap.close()
    assert found is not None
    assert torch.equal(found.weights["w"], held.weights["w"])
    assert found.first == {"w": 4}
    held.gradients["w"][2, 1] = 7.0
    assert found.gradients["w"][2, 1] == 7.0


def test_a_heap_that_is_gone_or_another_is_not_taken() -> None:
    heap, other = Heap(), Heap()
    held = _held(heap)
    told = describe(heap, held)
    assert look_at(held.ownership, {**told, "file": other.file}) is None
    heap.close()
    assert look_at(held.ownership, told) is None


def test_workers_of_a_host_read_each_other_in_place_unless_told_not_to(pool: Pool) -> None:
    plan = NAMED_PLANS["everything uneven at once"]("fp32")
    pool.train(plan, 1, held_out_rows=0)
    assert any(pool.call("reads_in_place"))
    pool.train(plan, 1, held_out_rows=0, read_in_place=False)
    assert not any(pool.call("reads_in_place"))
    pool.train(plan, 1, held_out_rows=0, time_scale=1.0)
    assert not any(pool.call("reads_in_place"))
