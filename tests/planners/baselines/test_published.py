"""Published problems and their prices, from small made-up files."""

from __future__ import annotations

import json
import math

import pytest

from hethub.errors import InputError
from hethub.planners.baselines.problems import load_problems
from hethub.planners.baselines.published import PublishedPrices, load_cloud_links
from hethub.planners.baselines.split import Group
from hethub.simulate.sailor import SailorCosts

KINDS = ("embedding", "decoder_first", "decoder", "head")
HEAD = (
    "scope,cluster,sender_device_type,sender_zone,sender_gpus,receiver_device_type,receiver_zone,receiver_gpus,"
    "coef_log2_squared,coef_log2,coef_constant,max_measured_gb_per_s,origin\n"
)


def problem_file(tmp_path, **changes):
    groups = [
        {"device_type": name, "nodes": 2, "devices_per_node": 2, "zone": zone}
        for name, zone in (("F", "east-a"), ("F", "east-b"), ("S", "east-a"))
    ]
    entry = {"problem_id": "one", "objective": "throughput", "groups": groups} | changes
    types = {
        name: {
            "devices_per_node": 2,
            "memory_gib_check": 10,
            "tensor_parallel_profiled": [1, 2, 4],
            "micro_batch_profiled": [1, 2],
        }
        for name in "FS"
    }
    content = {
        "training": {"decoder_layers": 2, "global_batch": 8},
        "device_types": types,
        "problems": [entry],
    }
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(content))
    return path


def link_file(tmp_path, constants):
    """One link each way for (type, zone, devices, type, zone, devices): GB/s at any size, and the largest measured."""
    rows = [
        f"inter_node,gcp,{','.join(map(str, ends))},0,0,{speed},{most},measured\n"
        for ends, (speed, most) in constants.items()
    ]
    path = tmp_path / "link_bandwidth.csv"
    path.write_text(HEAD + "".join(rows))
    return path


@pytest.fixture
def prices(tmp_path):
    constants = {}
    for one, other in ((a, b) for a in ("east-a", "east-b") for b in ("east-a", "east-b")):
        slow = 1.0 if one == other else 0.5
        constants["F", one, 1, "F", other, 1] = (slow * 4, 100)
        constants["F", one, 2, "F", other, 2] = (slow * 8, 100)
        constants["S", one, 1, "S", other, 1] = (slow * 2, slow * 1.5)
    times = {("F", 1, rows, kind): (rows, 2 * rows, 0.5) for rows in (1, 2) for kind in KINDS}
    times |= {("S", 1, 1, kind): (3, 6, 0.5) for kind in KINDS}
    memory = {(d, kind): (1e6 / d, 1e6 / d, 250_000) for d in (1, 2) for kind in KINDS}
    problem = load_problems(problem_file(tmp_path))["one"]
    links = load_cloud_links(link_file(tmp_path, constants))
    return PublishedPrices(problem, SailorCosts(times, {}, memory), links)


def test_zones_of_a_region_are_one_kind_and_degrees_stay_in_a_node(prices):
    assert [(kind.device_type, kind.region, kind.count) for kind in prices.kinds] == [
        ("F", "east", 8),
        ("S", "east", 4),
    ]
    assert prices.kinds[0].degrees == (1, 2)


def test_rows_that_were_not_profiled_are_done_in_parts(prices):
    fast, slow = Group(0, 1), Group(1, 1)
    assert prices.layer_seconds(fast, 3)[-1] == pytest.approx(4 * 9)
    assert prices.layer_seconds(slow, 2)[-1] == pytest.approx(2 * 4 * 9)
    assert math.isinf(prices.layer_seconds(Group(0, 2), 1)[-1])


def test_messages_take_the_slowest_link_of_a_region_never_above_what_was_measured(prices):
    fast, slow = Group(0, 1), Group(1, 1)
    assert prices.forth_seconds(fast, fast, 1, 1) == pytest.approx(1e6 / 2e9)
    assert prices.forth_seconds(slow, slow, 1, 1) == pytest.approx(1e6 / 0.75e9)
    assert prices.forth_seconds(fast, slow, 1, 2) == pytest.approx(2e6 / 0.75e9)


def test_a_ring_is_divided_by_the_least_degree_and_runs_at_one_devices_bandwidth(prices):
    alone = prices.reduce_seconds((Group(0, 2),), 4, (1, 3))
    assert alone == pytest.approx(2 * 3 * (2 * 4e6 / 2 / 4) / 2e9)
    assert prices.reduce_seconds((Group(0, 2), Group(0, 1)), 4, (1, 3)) == pytest.approx(2 * alone)
    assert prices.reduce_seconds((Group(0, 2),), 1, (1, 3)) == 0


def test_a_ring_of_nodes_runs_at_what_was_measured_of_whole_ones(prices):
    """Two layers of 1e6 elements, divided by the least degree, over 100 GB/s whatever the message."""
    alone = prices.node_ring_seconds((Group(0, 2),), 4, (1, 3))
    assert alone == pytest.approx(2 * 3 / 4 * (2 * 4e6 / 2) / 100e9)
    assert prices.node_ring_seconds((Group(0, 2), Group(0, 1)), 4, (1, 3)) == pytest.approx(2 * alone)
    assert prices.node_ring_seconds((Group(0, 2),), 1, (1, 3)) == 0


def test_memory_grows_with_the_stages_that_follow(prices):
    group = Group(0, 1)
    assert prices.fits(group, 2, (0, 4), 0)
    assert not prices.fits(group, 2, (0, 4), 1100)


def test_bad_files_are_one_line(tmp_path):
    missing = problem_file(tmp_path)
    missing.write_text(missing.read_text().replace('"zone"', '"place"'))
    with pytest.raises(InputError, match="problem one lacks 'zone'"):
        load_problems(missing)
    links = link_file(tmp_path, {("F", "east-a", 1, "F", "east-a", 1): ("fast", 1)})
    with pytest.raises(InputError, match=r"link_bandwidth.csv:2: .*fast"):
        load_cloud_links(links)
    with pytest.raises(InputError, match="no link between 1 x F in east-a and 1 x F in east-a"):
        load_cloud_links(link_file(tmp_path, {})).between(("F", "east-a", 1), ("F", "east-a", 1))
