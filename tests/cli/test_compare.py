"""`hethub compare`: table, JSON, plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hethub.cli.main import app
from hethub.errors import InputError

LAPTOP = Path(__file__).parents[2] / "cluster_specs" / "laptop.yaml"


def _run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_json_has_every_planner_with_speed_and_plan_and_the_page_a_bar_each(tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    planners = json.loads(_run("compare", LAPTOP, "--json", "--html", page))["planners"]
    assert {"HetHub", "Sailor-like", "Metis-like", "even"} <= {planner["name"] for planner in planners}
    for planner in planners:
        assert (planner["tokens_per_second"] is None) == (planner["failure"] is not None)
        assert planner["name"] in page.read_text(encoding="utf-8")


def test_piped_output_is_a_line_a_planner() -> None:
    lines = _run("compare", LAPTOP).splitlines()
    assert lines[0].startswith("# ")
    assert {len(line.split("\t")) for line in lines[1:]} == {6}


def test_a_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its folder does not exist"):
        _run("compare", LAPTOP, "--html", tmp_path / "no" / "page.html")


def _with(tmp_path: Path, text: str) -> Path:
    """The laptop's cluster file with more keys."""
    (tmp_path / "laptop-model").mkdir()
    model = LAPTOP.parent / "laptop-model" / "config.json"
    (tmp_path / "laptop-model" / "config.json").write_text(
        model.read_text(encoding="utf-8"), encoding="utf-8"
    )
    path = tmp_path / "cluster.yaml"
    path.write_text(LAPTOP.read_text(encoding="utf-8") + text, encoding="utf-8")
    return path


def test_every_planner_keeps_the_constraints_or_says_that_it_finds_nothing(tmp_path: Path) -> None:
    path = _with(tmp_path, "constraints: {max_pipeline: 2, tensor_parallel: {fast: [2]}}\n")
    planners = json.loads(_run("compare", path, "--json"))["planners"]
    assert planners[0]["name"] == "HetHub"
    assert planners[0]["failure"] is None
    for planner in planners:
        for pipeline in planner["pipelines"] or ():
            assert len(pipeline["stages"]) <= 2
            for stage in pipeline["stages"]:
                for replica in stage["replicas"]:
                    degree = sum(rank.get("count", 1) for rank in replica["ranks"])
                    devices = str(replica["ranks"][0])
                    assert "fast/" not in devices or degree == 2


def test_plans_are_held_against_the_objective_and_its_limits(tmp_path: Path) -> None:
    """All devices at 1 USD an hour, watts as given: a zone's limit that only a plan without its slow shelf keeps."""
    text = LAPTOP.read_text(encoding="utf-8")
    for name in ("fast", "middle", "slow"):
        text = text.replace(f"  {name}: {{", f"  {name}: {{power_watts: 100, usd_per_hour: 1, ", 1)
    path = _with(tmp_path, "objective: {best: usd_per_million_tokens, site_watts: {shelf: 250}}\n")
    extra = path.read_text(encoding="utf-8")[len(LAPTOP.read_text(encoding="utf-8")) :]
    path.write_text(text + extra, encoding="utf-8")
    planners = {p["name"]: p for p in json.loads(_run("compare", path, "--json"))["planners"]}
    assert planners["HetHub"]["missed_limits"] == {}
    even = planners["even"]["missed_limits"]["site_watts.shelf"]
    assert even == {"limit": 250.0, "figure": 400.0}
    cheapest = min(p["usd_per_million_tokens"] for p in planners.values() if p["failure"] is None)
    assert planners["HetHub"]["usd_per_million_tokens"] <= cheapest * 1.05
    header = _run("compare", path).splitlines()[1]
    assert "USD/Mtoken" in header


def test_a_search_without_time_ends_with_what_it_has(tmp_path: Path) -> None:
    planners = json.loads(_run("compare", LAPTOP, "--time-limit", "0", "--json"))["planners"]
    ours = planners[0]
    assert ours["name"] == "HetHub"
    assert ours["failure"] is None
