"""Paths between devices and the capacities that transfers queue for."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.cost.graph import STAGED_CHUNK_BYTES, CostGraph, reserve
from hethub.errors import InputError
from hethub.specs.cluster import Cluster
from tests.plan_strategies import clusters, three_speeds

FAST, FAST2, MIDDLE, MIDDLE2, SLOW, SLOW2 = range(6)  # as `three_speeds` numbers them
MB = 1e6


def arrivals(cluster: Cluster, transfers: list[tuple[int, int, float]]) -> list[float]:
    """All sent at time 0, in this order."""
    graph = CostGraph(cluster)
    free_at = [0.0] * graph.cell_count
    return [reserve(free_at, graph.path(a, b), size, 0.0) for a, b, size in transfers]


@settings(max_examples=50)
@given(cluster=clusters())
def test_a_way_back_is_as_fast_and_takes_other_cells(cluster: Cluster) -> None:
    graph = CostGraph(cluster)
    count = len(cluster.devices())
    for a in range(count):
        for b in range(a):
            there, back = graph.path(a, b), graph.path(b, a)
            assert there.seconds(1e6) == back.seconds(1e6)
            assert there.transport == back.transport
            assert not {cell for cell, _ in there.cells} & {cell for cell, _ in back.cells}


@settings(max_examples=50)
@given(cluster=clusters())
def test_the_slowest_cell_is_the_paths_own_speed(cluster: Cluster) -> None:
    """So that messages between two devices cannot overtake each other."""
    graph = CostGraph(cluster)
    count = len(cluster.devices())
    for a in range(count):
        for b in range(count):
            if a != b:
                path = graph.path(a, b)
                assert min(speed for _, speed in path.cells) == path.bandwidth_bytes_per_second
                assert all(0 <= cell < graph.cell_count for cell, _ in path.cells)


@settings(max_examples=50)
@given(cluster=clusters())
def test_the_slowest_links_are_as_slow_as_the_path(cluster: Cluster) -> None:
    """Seen to catch: the first of two alike networks alone (a way back named the other one)."""
    graph = CostGraph(cluster)
    links, totals = cluster.named_links(), {cross.name: cross for cross in cluster.links}
    count = len(cluster.devices())
    for a in range(count):
        for b in range(count):
            if a == b:
                continue
            found = graph.slowest_links(a, b)
            assert set(found) == set(graph.slowest_links(b, a))
            for name in found:
                total = totals[name].total_bandwidth_bytes_per_second if name in totals else None
                speed = min(links[name].bandwidth_bytes_per_second, total or float("inf"))
                assert speed == graph.path(a, b).bandwidth_bytes_per_second


@settings(max_examples=100)
@given(
    cluster=clusters(),
    sizes=st.lists(st.integers(0, 10**6), min_size=2, max_size=6),
    gaps=st.lists(st.sampled_from([0.0, 0.001, 0.1]), min_size=6, max_size=6),
)
def test_messages_of_a_channel_arrive_in_order(cluster: Cluster, sizes: list[int], gaps: list[float]) -> None:
    graph = CostGraph(cluster)
    path = graph.path(0, len(cluster.devices()) - 1)
    free_at = [0.0] * graph.cell_count
    now = 0.0
    found = []
    for size, gap in zip(sizes, gaps, strict=False):
        now += gap
        found.append(reserve(free_at, path, size, now))
        assert found[-1] >= (now + path.seconds(size)) * (1 - 1e-12)
    assert found == sorted(found)


def test_an_idle_path_takes_latency_and_bytes_over_its_slowest_link() -> None:
    assert arrivals(three_speeds(), [(FAST, FAST2, 4 * MB)]) == pytest.approx([0.05e-3 + 4 / 400])
    assert arrivals(three_speeds(), [(FAST, MIDDLE, 4 * MB)]) == pytest.approx([0.2e-3 + 4 / 100])
    assert arrivals(three_speeds(), [(FAST, SLOW, 4 * MB)]) == pytest.approx([0.5e-3 + 4 / 50])


def test_devices_of_one_node_share_its_way_out() -> None:
    one, other = arrivals(three_speeds(), [(FAST, MIDDLE, 4 * MB), (FAST2, MIDDLE2, 4 * MB)])
    assert one == pytest.approx(0.2e-3 + 0.04)
    assert other == pytest.approx(0.2e-3 + 0.08)


def test_devices_of_one_node_share_its_part_of_a_cross_link() -> None:
    one, other = arrivals(three_speeds(), [(FAST, SLOW, 4 * MB), (FAST2, SLOW2, 4 * MB)])
    assert one == pytest.approx(0.5e-3 + 0.08)
    assert other == pytest.approx(0.5e-3 + 0.16)


def test_a_slow_cross_link_leaves_the_nodes_own_network_to_others() -> None:
    """The adapter does 100 MB/s and the cross link 50: it is free for a neighbour after half the time."""
    _, other = arrivals(three_speeds(), [(FAST, SLOW, 4 * MB), (FAST2, MIDDLE, 4 * MB)])
    assert other == pytest.approx(0.04 + 0.2e-3 + 0.04)


def test_two_directions_do_not_wait_for_each_other() -> None:
    one, other = arrivals(three_speeds(), [(FAST, SLOW, 4 * MB), (SLOW, FAST, 4 * MB)])
    assert one == other


@pytest.mark.parametrize(("total", "wait"), [(None, 0.0), (50 * MB, 8 / 50 - 0.08), (75 * MB, 8 / 75 - 0.08)])
def test_all_nodes_queue_for_what_a_cross_link_has_in_total(total: float | None, wait: float) -> None:
    cluster = three_speeds()
    apart = replace(cluster.node_groups[2], nodes=2, devices_per_node=1)
    cluster = replace(
        cluster,
        node_groups=(*cluster.node_groups[:2], apart),
        links=(replace(cluster.links[0], total_bandwidth_bytes_per_second=total),),
    )
    one, other = arrivals(cluster, [(MIDDLE, SLOW, 4 * MB), (MIDDLE2, SLOW2, 4 * MB)])
    assert one == pytest.approx(0.5e-3 + 0.08)
    assert other == pytest.approx(0.5e-3 + 0.08 + wait)


def test_a_transfer_that_waits_elsewhere_keeps_nobody_from_an_idle_link() -> None:
    """Taken together, the cells of a waiting transfer stood idle: steps of big plans came out twice as long."""
    crowd = [(FAST, MIDDLE, 40 * MB), (FAST2, MIDDLE2, 4 * MB), (SLOW, MIDDLE2, 4 * MB)]
    assert arrivals(three_speeds(), crowd)[2] < arrivals(three_speeds(), crowd)[1]


def test_groups_without_a_link_are_named() -> None:
    graph = CostGraph(replace(three_speeds(), links=()))
    with pytest.raises(InputError, match="no link joins a and c"):
        graph.path(FAST, SLOW)


def test_host_staged_messages_are_copied_in_chunks_beside_the_wire() -> None:
    """The slowest of copy, wire and copy sets the pace; first and last chunk are copied alone."""
    cluster = three_speeds()
    links = tuple(
        replace(cross, link=replace(cross.link, transport="host-staged")) for cross in cluster.links
    )
    groups = tuple(
        replace(group, inter_link=replace(group.inter_link, transport="host-staged"))
        for group in cluster.node_groups
    )
    staged = replace(cluster, links=links, node_groups=groups)
    plain = CostGraph(staged).path(FAST, SLOW)
    for speed in (plain.bandwidth_bytes_per_second / 2, plain.bandwidth_bytes_per_second * 4):
        types = dict(staged.device_types)
        name = staged.devices()[SLOW].type.name
        types[name] = replace(types[name], host_copy_bytes_per_second=speed)
        path = CostGraph(replace(staged, device_types=types)).path(FAST, SLOW)
        pace = min(speed, plain.bandwidth_bytes_per_second)
        expected = plain.latency_seconds + STAGED_CHUNK_BYTES / speed + 1e6 / pace
        assert path.seconds(1e6) == pytest.approx(expected)
        assert path.cells[-1] == (path.cells[-1][0], speed)
        assert path.cells[-1][0] % 2 == 1  # a way in
