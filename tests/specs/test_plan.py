"""The plan file: it stands alone, comes back as it was written, and ranges say the same as single devices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from hethub.errors import InputError
from hethub.program.check import check_plan, require_valid
from hethub.specs.document import dump_yaml, load_document
from hethub.specs.layout import lay_out
from hethub.specs.plan import Pipeline, Plan, load_plan, plan_to_spec, save_plan
from tests.plan_strategies import NAMED_PLANS, plans


def saved(plan: Plan, folder: Path) -> Path:
    path = folder / "plan.yaml"
    save_plan(plan, path)
    return path


def with_pipelines(plan: Plan, pipelines: list[dict[str, Any]]) -> Plan:
    return plan.model_copy(update={"pipelines": [Pipeline.model_validate(entry) for entry in pipelines]})


@pytest.mark.parametrize("name", NAMED_PLANS)
def test_a_named_plan_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    plan = NAMED_PLANS[name]("fp64")
    loaded, _ = load_plan(saved(plan, tmp_path))
    assert loaded == plan
    assert check_plan(loaded) == []


@settings(max_examples=50)
@given(plan=plans())
def test_a_random_plan_comes_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    loaded, _ = load_plan(saved(plan, tmp_path))
    assert plan_to_spec(loaded) == plan_to_spec(plan)
    assert lay_out(loaded) == lay_out(plan)


def test_what_was_found_with_the_plan_stays_with_it(tmp_path: Path) -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    told = {"step_seconds": 0.25, "device_types": [{"name": "fast", "busy_ratio": 1e-3}]}
    plan = plan.model_copy(
        update={"prediction": told, "bounds": {"share": None}, "search": {"considered": 3}}
    )
    loaded, _ = load_plan(saved(plan, tmp_path))
    assert (loaded.prediction, loaded.bounds, loaded.search) == (told, {"share": None}, {"considered": 3})


def test_saving_leaves_nothing_but_the_file(tmp_path: Path) -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    path = saved(plan, tmp_path)
    saved(NAMED_PLANS["gpipe"]("fp32"), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert load_plan(path)[0].name == "gpipe"


def test_ranges_and_repeats_lay_out_as_single_devices_do() -> None:
    """Two pipelines of two replicas of two ranks: the range is taken rank, replica, pipeline."""
    plan = NAMED_PLANS["single device"]("fp32")
    six = plan.cluster.node_groups[0]
    cluster = replace(plan.cluster, node_groups=(replace(six, nodes=2, devices_per_node=4),), links=())
    plan = plan.model_copy(update={"cluster": cluster})
    share = {"heads": 2, "ffn": 12, "vocab": 32}
    body = {"micro_batches": 2, "micro_batch_rows": 2}

    def pipeline(replicas: list[dict[str, Any]], repeat: int) -> dict[str, Any]:
        return {
            **body,
            "repeat": repeat,
            "stages": [{"layers": [0, 5], "in_flight": 1, "replicas": replicas}],
        }

    ranks = [{"devices": "a/0-1/0-3", "count": 2, **share}]
    short = with_pipelines(plan, [pipeline([{"rows": 1, "repeat": 2, "ranks": ranks}], 2)])
    names = iter(device.name for device in cluster.devices())
    long = with_pipelines(
        plan,
        [
            pipeline(
                [{"rows": 1, "ranks": [{"device": next(names), **share} for _ in "ab"]} for _ in "cd"], 1
            )
            for _ in "ef"
        ],
    )
    assert check_plan(short) == check_plan(long) == []
    assert lay_out(short) == lay_out(long)


def test_entries_of_a_range_are_dealt_to_each_copy() -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    rank = {"devices": "b/0-1/0", "heads": 4, "ffn": 24, "vocab": 64}
    stage = {"layers": [0, 5], "in_flight": 2, "replicas": [{"rows": 2, "ranks": [rank]}]}
    twice = with_pipelines(
        plan, [{"repeat": 2, "micro_batches": 2, "micro_batch_rows": 2, "stages": [stage]}]
    )
    layout = lay_out(twice)
    assert [list(p.stages[0].devices()) for p in layout.pipelines] == [[2], [3]]
    assert [p.first_row for p in layout.pipelines] == [0, 4]


def test_ten_thousand_ranks_load_from_a_short_file(tmp_path: Path) -> None:
    plan = NAMED_PLANS["single device"]("fp32")
    group = replace(plan.cluster.node_groups[0], nodes=1250, devices_per_node=8)
    cluster = replace(plan.cluster, node_groups=(group,), links=())
    rank = {"devices": "a/0-1249/0-7", "count": 4, "heads": 1, "ffn": 6, "vocab": 16}
    stage = {"layers": [0, 5], "in_flight": 1, "replicas": [{"rows": 1, "repeat": 10, "ranks": [rank]}]}
    pipelines = [{"repeat": 250, "micro_batches": 1, "micro_batch_rows": 10, "stages": [stage]}]
    workload = replace(plan.workload, global_batch=2500)
    large = with_pipelines(plan, pipelines).model_copy(update={"cluster": cluster, "workload": workload})
    path = saved(large, tmp_path)
    assert path.stat().st_size < 3000
    layout = lay_out(load_plan(path)[0])
    assert len(layout.used) == 10_000
    assert len(layout.pipelines) == 250


def written(plan: Plan, folder: Path, keys: tuple[str | int, ...], value: object) -> Path:
    """The plan's file with one value changed by hand."""
    content = plan_to_spec(plan)
    at: Any = content
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path = folder / "edited.yaml"
    path.write_text(dump_yaml(content), encoding="utf-8")
    return path


REFUSED = {
    "an unknown key": (("pipelines", 0, "stage"), [], "stage"),
    "no rows": (("pipelines", 0, "micro_batch_rows"), 0, "pipelines[0].micro_batch_rows"),
    "no stages": (("pipelines", 0, "stages"), [], "pipelines[0].stages"),
    "another version": (("version",), 2, "version"),
    "three bounds": (("pipelines", 0, "stages", 0, "layers"), [0, 1, 2], "pipelines[0].stages[0].layers"),
    "an unknown recomputation": (("pipelines", 0, "stages", 0, "recompute"), "some", "recompute"),
    "two ways to name devices": (
        ("pipelines", 0, "stages", 0, "replicas", 0, "ranks", 0, "devices"),
        "a/0/0",
        "exactly one of",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_out_of_shape_is_refused_with_its_line(what: str, tmp_path: Path) -> None:
    keys, value, words = REFUSED[what]
    path = written(NAMED_PLANS["pipeline of 2"]("fp32"), tmp_path, keys, value)
    with pytest.raises(InputError) as error:
        load_plan(path)
    assert words in error.value.message
    assert error.value.message.startswith(f"{path}:")


def test_a_layer_left_out_by_hand_is_told_with_file_and_line(tmp_path: Path) -> None:
    keys = ("pipelines", 0, "stages", 1, "layers")
    path = written(NAMED_PLANS["pipeline of 2"]("fp32"), tmp_path, keys, [3, 5])
    plan, document = load_plan(path)
    with pytest.raises(InputError) as error:
        require_valid(plan, document, str(path))
    assert error.value.message == (
        f"{load_document(path).where(keys)} pipelines[0].stages[1].layers: "
        "layer 2 is left out before this stage. Begin it at 2, or extend the one before."
    )


def test_a_share_that_stands_by_default_is_told_where_its_rank_stands(tmp_path: Path) -> None:
    rank = ("pipelines", 0, "stages", 0, "replicas", 0, "ranks", 0)
    path = written(
        NAMED_PLANS["pipeline of 2"]("fp32"), tmp_path, rank, {"device": "a/0/0", "ffn": 24, "vocab": 64}
    )
    plan, document = load_plan(path)
    with pytest.raises(InputError) as error:
        require_valid(plan, document, str(path))
    key = "pipelines[0].stages[0].replicas[0].ranks[0].heads"
    assert error.value.message.startswith(f"{document.where(rank)} {key}: each rank needs at least 1")
