"""A model that fits nowhere: what is short, by how much, and a change that was tried and fits."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hethub.errors import InfeasibleError
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.specs.cluster import Cluster
from tests.planners.examples import one_two_four, with_memory


def _refusal(problem: Problem) -> str:
    with pytest.raises(InfeasibleError) as error:
        FirstPlanner().plan(problem)
    assert error.value.exit_code == 3
    return error.value.message


def _with_nodes(cluster: Cluster, name: str, more: int) -> Cluster:
    groups = tuple(
        replace(group, nodes=group.nodes + more) if group.name == name else group
        for group in cluster.node_groups
    )
    return replace(cluster, node_groups=groups)


def test_the_named_change_fits_and_one_node_less_does_not() -> None:
    problem = one_two_four()
    tight = with_memory(problem.cluster, 230 * 1024)
    message = _refusal(Problem.of(tight, problem.workload))
    assert re.search(r"needs [\d.]+ MiB and has 0.22 MiB, [\d.]+ MiB short", message)
    found = re.search(r"\((\d+) more nodes? in group (\w)\) would fit", message)
    assert found is not None
    nodes, group = int(found[1]), found[2]
    FirstPlanner().plan(Problem.of(_with_nodes(tight, group, nodes), problem.workload))
    if nodes > 1:
        _refusal(Problem.of(_with_nodes(tight, group, nodes - 1), problem.workload))


def test_where_one_layer_is_too_big_no_number_of_devices_is_promised() -> None:
    problem = one_two_four()
    message = _refusal(Problem.of(with_memory(problem.cluster, 8 * 1024), problem.workload))
    assert "Nor do more nodes of any one group" in message
    assert "would fit" not in message
