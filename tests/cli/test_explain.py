"""`hethub plan --explain` and `hethub diff`: what they print and that their figures agree with the plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hethub.cli.explain import explanation
from hethub.cli.main import app
from hethub.cost.measured import NOT_MEASURED
from hethub.errors import InputError
from hethub.planners.answer import answer
from hethub.specs.cluster import Planning
from hethub.specs.constraints import FASTEST, FREE
from hethub.specs.plan import Plan, load_plan, save_plan
from tests.plan_strategies import NAMED_PLANS
from tests.planners.examples import only_across_nodes

LAPTOP = Path(__file__).parents[2] / "cluster_specs" / "laptop.yaml"


def _run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_run("plan", LAPTOP, "--explain", "--json"))
    return found


def test_the_waterfall_is_the_whole_step(figures: dict[str, Any]) -> None:
    assert sum(figures["explanation"]["waterfall"].values()) == pytest.approx(1.0)


def test_every_type_has_a_limit_that_is_its_largest_worth(figures: dict[str, Any]) -> None:
    limits, links = figures["explanation"]["limits"], figures["explanation"]["links"]
    assert {entry["device_type"] for entry in limits} == {"fast", "middle", "slow"}
    fastest = max(entry["faster"] for entry in links)
    assert [entry["faster"] for entry in links] == sorted((entry["faster"] for entry in links), reverse=True)
    for entry in limits:
        worth = {"memory": entry["more_memory"], "compute": entry["more_speed"], "link": fastest}
        assert entry["limit"] == "nothing" or worth[entry["limit"]] == max(worth.values())
        assert entry["one_more_node"] >= 0


def test_boundaries_are_those_of_the_plan(figures: dict[str, Any]) -> None:
    pipelines = figures["plan"]["pipelines"]
    crossings = sum(p.get("repeat", 1) * (len(p["stages"]) - 1) for p in pipelines)
    # replicas that share a micro-batch have more than one message a boundary
    assert sum(entry["count"] for entry in figures["explanation"]["boundaries"]) >= crossings


def test_printed_parts_have_headings_and_the_plans_that_lost_their_reason() -> None:
    lines = _run("plan", LAPTOP, "--explain", "-o", "/dev/null").splitlines()
    headings = [line for line in lines if line.startswith("# ")]
    for words in ("where the time", "what limits", "twice as fast", "boundaries", "plans that lost"):
        assert any(words in heading for heading in headings)
    lost = lines[lines.index("# plans that lost") + 1 :]
    assert lost
    assert all(len(line.split("\t")) == 3 for line in lost if "\t" in line)


def _saved(folder: Path, name: str) -> Path:
    plan: Plan = NAMED_PLANS[name]("fp32")
    path = folder / f"{name.replace(' ', '-')}.yaml"
    save_plan(plan, path)
    return path


def test_a_plan_does_not_differ_from_itself(tmp_path: Path) -> None:
    path = _saved(tmp_path, "pipeline of 2")
    found = json.loads(_run("diff", path, path, "--json"))
    assert (found["changed_devices"], found["moved_layers"], found["weight_bytes"], found["state_bytes"]) == (
        0,
        0,
        0,
        0,
    )
    assert "every device holds what it held" in _run("diff", path, path)


def test_a_layer_more_for_a_device_is_counted_with_its_bytes(tmp_path: Path) -> None:
    """One decoder goes from the second stage to the first: only its bytes have to move."""
    path = _saved(tmp_path, "pipeline of 2")
    plan, _ = load_plan(path)
    first, second = plan.pipelines[0].stages
    bound = first.layers[1] + 1
    stages = [
        first.model_copy(update={"layers": (first.layers[0], bound)}),
        second.model_copy(update={"layers": (bound, second.layers[1])}),
    ]
    other = plan.model_copy(update={"pipelines": [plan.pipelines[0].model_copy(update={"stages": stages})]})
    save_plan(other, tmp_path / "other.yaml")
    found = json.loads(_run("diff", path, tmp_path / "other.yaml", "--json"))
    devices = sum(rank.count * replica.repeat for replica in first.replicas for rank in replica.ranks)
    assert found["moved_layers"] == devices
    assert found["weight_bytes"] > 0
    back = json.loads(_run("diff", tmp_path / "other.yaml", path, "--json"))
    assert back["weight_bytes"] == found["weight_bytes"]
    text = _run("diff", path, tmp_path / "other.yaml")
    assert f"{devices} layers go" in text


def test_plans_of_two_models_are_refused(tmp_path: Path) -> None:
    path = _saved(tmp_path, "pipeline of 2")
    _run("plan", LAPTOP, "-o", tmp_path / "laptop.yaml")
    with pytest.raises(InputError, match="Give two plans of one model and precision"):
        _run("diff", path, tmp_path / "laptop.yaml")


def test_of_an_even_split_that_stands_in_it_is_said_that_limits_are_not_known() -> None:
    """Seen to catch: an AssertionError (a real bug)."""
    problem = only_across_nodes()
    told = Planning(cluster=problem.cluster, workload=problem.workload, constraints=FREE, objective=FASTEST)
    found = answer(problem.cluster, problem.workload)
    assert found.plan.name == "even"
    why = explanation(found, told, NOT_MEASURED)
    assert why.content["limits"] == why.content["links"] == []
    assert sum(line.startswith("not known") for line in why.lines()) == 2
