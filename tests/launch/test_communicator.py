"""Groups across islands and emulated links, between real processes."""

from __future__ import annotations

import datetime
import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist

from hethub.cost.graph import CostGraph
from hethub.launch.communicator import PeerLostError
from hethub.launch.groups import ExchangeGroup
from hethub.launch.links import LinkTable
from tests.plan_strategies import three_speeds

SIZE = 3
# Added in rank order they give 0 + 1; in any other order, with the first two apart, 0.
VALUES = (1e16, -1e16, 1.0)


def _member(rank: int, port: int, connection: Connection) -> None:
    limit = datetime.timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=limit)
    group = ExchangeGroup(range(SIZE))
    wide = torch.full((2, 3), VALUES[rank], dtype=torch.float64)
    turned = torch.arange(6.0).view(2, 3).T * (rank + 1)  # not contiguous
    found = {
        "sum": group.sum(wide).tolist(),
        "turned": group.sum(turned).tolist(),
        "max": group.max(torch.tensor([float(rank), -float(rank)])).tolist(),
        "events": [b >= a for a, b in group.take_events()],
        "again": group.take_events(),
        "lost": None,
    }
    if rank < SIZE - 1:  # the last one leaves
        connection.send("ready")
        connection.recv()
        try:
            group.sum(torch.ones(1))
        except PeerLostError as error:
            found["lost"] = str(error)
    connection.send(found)


@pytest.fixture(scope="module")
def answers() -> list[dict]:
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ours, processes = [], []
    for rank in range(SIZE):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=_member, args=(rank, store.port, theirs), daemon=True))
        processes[-1].start()
        ours.append(mine)
    last = ours[-1].recv()
    processes[-1].join()
    for connection in ours[:-1]:
        assert connection.recv() == "ready"
        connection.send("go")
    found = [*(connection.recv() for connection in ours[:-1]), last]
    for process in processes:
        process.join()
    return found


def test_a_sum_is_taken_in_rank_order_by_every_member(answers):
    assert [a["sum"] for a in answers] == [[[1.0] * 3] * 2] * SIZE


def test_a_tensor_that_is_not_contiguous_is_summed_in_place(answers):
    assert [a["turned"] for a in answers] == [(torch.arange(6.0).view(2, 3).T * 6).tolist()] * SIZE


def test_a_maximum_is_elementwise(answers):
    assert [a["max"] for a in answers] == [[2.0, 0.0]] * SIZE


def test_events_are_counted_once(answers):
    assert all(a["events"] == [True] * 3 and a["again"] == [] for a in answers)


def test_a_lost_peer_is_named_as_such(answers):
    assert all("is lost" in a["lost"] for a in answers[:-1])


def test_messages_over_one_emulated_link_wait_for_each_other(tmp_path):
    graph = CostGraph(three_speeds(emulated=True))
    path = graph.path(0, 4)  # east to west: 50 MB/s, 0.5 ms
    LinkTable.create(tmp_path / "links", graph.cell_count)
    one, other = (LinkTable(tmp_path / "links", graph.cell_count) for _ in range(2))
    arrivals = [table.reserve(path, 1e6, 0.0) for table in (one, other)]
    assert arrivals[1] - arrivals[0] == pytest.approx(1e6 / 50e6)
    assert other.reserve(graph.path(4, 0), 1e6, 0.0) == pytest.approx(arrivals[0])  # the way back is free
    LinkTable.clear(tmp_path / "links")
    assert one.reserve(path, 1e6, 0.0) == arrivals[0]
    one.close()
    other.close()
