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
