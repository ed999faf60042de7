"""The checker accepts every valid plan and refuses each single change to one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hethub.errors import InputError
from hethub.program.check import check_plan, require_valid, same_cluster
from hethub.specs.cluster import Cluster
from hethub.specs.plan import Pipeline, Plan
from tests.plan_strategies import NAMED_PLANS, plans, three_speeds

RANK = (0, "stages", 0, "replicas", 0, "ranks", 0)


def tree(plan: Plan) -> list[dict[str, Any]]:
    return [pipeline.model_dump() for pipeline in plan.pipelines]


def rebuilt(plan: Plan, content: list[dict[str, Any]]) -> Plan:
    return plan.model_copy(update={"pipelines": [Pipeline.model_validate(entry) for entry in content]})


def edited(plan: Plan, keys: tuple[str | int, ...], value: object) -> Plan:
    """The plan with one value changed."""
    content: Any = tree(plan)
    at = content
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return rebuilt(plan, content)


def on(plan: Plan, cluster: Cluster) -> Plan:
    return plan.model_copy(update={"cluster": cluster})


@pytest.mark.parametrize("name", NAMED_PLANS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_named_plans_are_valid(name: str, precision: str) -> None:
    plan = NAMED_PLANS[name](precision)
    assert check_plan(plan) == []
    assert plan.workload.global_batch == 8


@settings(max_examples=100)
@given(plan=plans())
def test_random_plans_are_valid(plan: Plan) -> None:
    assert check_plan(plan) == []


CHANGES = {
    "a layer left out in front": ("pipeline of 2", (0, "stages", 0, "layers"), (1, 2), "layer 0 is left out"),
    "a layer left out between": ("pipeline of 2", (0, "stages", 1, "layers"), (3, 5), "layer 2 is left out"),
    "the head left out": ("pipeline of 2", (0, "stages", 1, "layers"), (2, 4), "layer 4 is left out"),
    "a layer twice": (
        "pipeline of 2",
        (0, "stages", 1, "layers"),
        (1, 5),
        "layer 1 is held by an earlier stage",
    ),
    "a layer too many": (
        "pipeline of 2",
        (0, "stages", 1, "layers"),
        (2, 6),
        "no range of the model's layers",
    ),
    "an empty stage": ("pipeline of 2", (0, "stages", 1, "layers"), (2, 2), "no range of the model's layers"),
    "a row short in a stage": ("rows 3 + 1", (0, "stages", 0, "replicas", 0, "rows"), 2, "add up to 3"),
    "a micro-batch too many": (
        "pipeline of 2",
        (0, "micro_batches"),
        5,
        "add up to 10, the global batch is 8",
    ),
    "heads left over": ("heads 6 + 2", (*RANK, "heads"), 5, "heads adds up to 7, the model has 8"),
    "a rank without heads": ("heads 6 + 2", (*RANK, "heads"), 0, "needs at least 1 of the 8"),
    "a key-value group cut": ("grouped-query heads", (*RANK, "heads"), 6, "Use a multiple of 4"),
    "a column short": ("heads 6 + 2", (*RANK, "ffn"), 17, "ffn adds up to 23, the model has 24"),
    "a word short": ("heads 6 + 2", (*RANK, "vocab"), 47, "vocab adds up to 63, the model has 64"),
    "words without an embedding": (
        "uneven pipeline of 3",
        (0, "stages", 1, "replicas", 0, "ranks", 0, "vocab"),
        64,
        "no embedding or head",
    ),
    "heads without a decoder": (
        "tied embedding on the first and last stage",
        (*RANK, "heads"),
        4,
        "no decoder layer",
    ),
    "a device not there": ("single device", (*RANK, "device"), "a/0/7", "not in the cluster"),
    "a device misspelt": ("single device", (*RANK, "device"), "a-0-0", "is not group/node/device"),
    "a range as one device": ("single device", (*RANK, "device"), "a/0/0-1", "is not one device"),
    "a device twice in a stage": ("rows 3 + 1", (*RANK, "device"), "c/0/0", "stands twice in stage 0"),
    "a device in two pipelines": (
        "two pipelines of different depth",
        (*RANK, "device"),
        "c/0/0",
        "stands in two pipelines",
    ),
    "too few devices": ("single device", (*RANK, "count"), 2, "1 devices are named"),
    "an unknown schedule": ("pipeline of 2", (0, "schedule"), "zb-1", 'Did you mean "zb-h1"? Known: 1f1b, '),
    "gpipe with little memory": ("gpipe", (0, "stages", 1, "in_flight"), 3, "Set in_flight to 4"),
    "more in flight than there is": ("pipeline of 2", (0, "stages", 0, "in_flight"), 5, "Use at most 4"),
    "a tied table cut differently in two places": (
        "chunks with a tied table twice on one device",
        (0, "stages", 2, "replicas", 0, "ranks"),
        [
            {"device": "c/0/0", "heads": 2, "ffn": 12, "vocab": 32},
            {"device": "a/0/0", "heads": 2, "ffn": 12, "vocab": 32},
        ],
        "Give it the same rows in both",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_with_its_reason(change: str) -> None:
    name, keys, value, words = CHANGES[change]
    found = check_plan(edited(NAMED_PLANS[name]("fp32"), keys, value))
    assert any(words in problem.text for problem in found), found
    assert all(problem.keys[0] == "pipelines" for problem in found)


def counts(content: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all whole numbers that make up the split (memory limits aside)."""
    if isinstance(content, bool) or content is None:
        return
    if isinstance(content, int):
        yield path
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        if key != "in_flight":
            yield from counts(value, (*path, key))


def lists(content: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all lists of more than one entry."""
    if isinstance(content, list) and len(content) > 1:
        yield path
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in items:
        yield from lists(value, (*path, key))


def value_at(content: Any, keys: tuple[str | int, ...]) -> Any:
    for key in keys:
        content = content[key]
    return content


@settings(max_examples=100)
@given(plan=plans(), data=st.data())
def test_one_more_of_anything_is_refused(plan: Plan, data: st.DataObject) -> None:
    keys = data.draw(st.sampled_from(list(counts(tree(plan)))))
    assert check_plan(edited(plan, keys, value_at(tree(plan), keys) + 1))


@settings(max_examples=100)
@given(plan=plans(), data=st.data())
def test_leaving_anything_out_is_refused(plan: Plan, data: st.DataObject) -> None:
    content = tree(plan)
    places = list(lists(content))
    assume(places)
    chosen = value_at(content, data.draw(st.sampled_from(places)))
    del chosen[data.draw(st.integers(0, len(chosen) - 1))]
    assert check_plan(rebuilt(plan, content))


def test_another_batch_is_refused() -> None:
    plan = NAMED_PLANS["everything uneven at once"]("fp32")
    workload = replace(plan.workload, global_batch=9)
    (problem,) = check_plan(plan.model_copy(update={"workload": workload}))
    assert problem.keys == ("pipelines",)
    assert "the rows add up to 8, the global batch is 9" in problem.text


def test_an_excluded_device_is_refused_as_such() -> None:
    cluster = replace(three_speeds(), exclude=frozenset({"c/0/0"}))
    (problem,) = check_plan(on(NAMED_PLANS["pipeline of 2"]("fp32"), cluster))
    assert "c/0/0: excluded" in problem.text
    assert problem.keys[:4] == ("pipelines", 0, "stages", 1)


def test_a_dtype_that_a_device_lacks_is_refused() -> None:
    cluster = three_speeds()
    older = {
        name: replace(t, peak_flops_per_second={"fp32": t.peak_flops_per_second["fp32"]})
        for name, t in cluster.device_types.items()
    }
    plan = on(NAMED_PLANS["single device"]("bf16"), replace(cluster, device_types=older))
    (problem,) = check_plan(plan)
    assert problem.keys == ("workload", "precision")
    assert "a/0/0" in problem.text and "bf16" in problem.text


def test_a_device_too_small_is_named_with_what_it_needs() -> None:
    cluster = three_speeds()
    small = {name: replace(t, memory_bytes=2**17) for name, t in cluster.device_types.items()}
    plan = on(NAMED_PLANS["single device"]("fp32"), replace(cluster, device_types=small))
    (problem,) = check_plan(plan)
    assert problem.keys == ("pipelines", *RANK, "device")
    for words in (
        "a/0/0 needs",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "0.12 MiB are available",
    ):
        assert words in problem.text


def test_a_valid_plan_passes_and_a_broken_one_raises_a_line_for_each_problem() -> None:
    plan = NAMED_PLANS["rows 3 + 1"]("fp32")
    require_valid(plan, None, "memory")
    broken = edited(edited(plan, (*RANK, "ffn"), 3), (0, "stages", 0, "in_flight"), 99)
    with pytest.raises(InputError) as error:
        require_valid(broken, None, "plan.yaml")
    lines = error.value.message.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "plan.yaml pipelines[0].stages[0].in_flight",
        "plan.yaml pipelines[0].stages[0].replicas[0].ranks",
    ]


def test_ranges_and_repeats_are_counted_innermost_first() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    rank = {"devices": "a/0/0-1, b/0-1/0", "count": 2, "heads": 2, "ffn": 12, "vocab": 32}
    stage = {"layers": (0, 5), "in_flight": 1, "replicas": [{"rows": 2, "ranks": [rank]}]}
    pair = {"repeat": 2, "micro_batches": 2, "micro_batch_rows": 2, "stages": [stage]}
    assert check_plan(rebuilt(plan, [pair])) == []
    rank["devices"] = "a/0/0, b/0/0, a/0/0, b/1/0"  # a/0/0 now stands in both copies
    (problem,) = check_plan(rebuilt(plan, [pair]))
    assert "a/0/0 stands in two pipelines" in problem.text


def test_a_cluster_is_compared_by_what_matters_to_a_plan() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    cluster = three_speeds()
    assert same_cluster(plan, cluster) == []
    assert same_cluster(plan, replace(cluster, name="renamed", emulated_time_scale=3.0)) == []
    fewer = replace(cluster.node_groups[1], nodes=1)
    changed = replace(
        cluster, node_groups=(cluster.node_groups[0], fewer), links=(), exclude=frozenset({"a/0/0"})
    )
    assert same_cluster(plan, changed) == [
        "node group b: nodes is 2 in the plan, 1 in the cluster",
        "node group c is in the plan only",
        "link east-west is in the plan only",
        "excluded only in the cluster: a/0/0",
    ]
