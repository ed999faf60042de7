"""The shipped boards: written from the code, readable by Grafana, and over metrics that exist."""

from __future__ import annotations

import json
import re
import sys
from itertools import combinations

import promql_parser
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from hethub.telemetry.boards import BOARDS, board_json
from hethub.telemetry.metrics import METRICS
from tests.launch.small_job import hethub
from tests.telemetry import promql
from tests.telemetry.promql import labels_of, panel_expressions, recorded_labels, variable_expressions

FILES = promql.BOARDS
EXPRESSIONS = [*panel_expressions(), *variable_expressions()]


def panels(board):
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module", params=[path.name for path in FILES])
def board(request):
    return next(json.loads(path.read_text()) for path in FILES if path.name == request.param)


def test_the_shipped_files_are_what_the_command_writes(capsys, tmp_path):
    result = hethub(capsys, tmp_path, "dashboards", "--output", "out", "--rules", "out")
    assert result.exit_code == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    folders = (FILES[0].parent, FILES[0].parents[2] / "prometheus" / "rules")
    shipped = {path.name: path.read_bytes() for folder in folders for path in folder.iterdir()}
    assert written == shipped


def test_the_command_shows_an_example(capsys, tmp_path):
    help_text = " ".join(hethub(capsys, tmp_path, "dashboards", "--help").out.split())
    assert "Example: hethub dashboards --output" in help_text


def test_a_board_is_the_same_text_each_time():
    assert [board_json(board) for board in BOARDS] == [board_json(board) for board in BOARDS]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda expression: expression.place)
def test_an_expression_is_promql_over_registered_metrics_and_labels(expression):
    labels = labels_of(expression.promql(), recorded_labels())
    assert labels is None or expression.labels <= labels


@pytest.mark.parametrize(
    "wrong",
    [
        "sum by (run) (rate(hethub_token_total[1m]))",  # the name
        'hethub_loss{device="0"}',  # a label that the metric lacks
        "sum by (stage) (hethub_node_devices)",  # a label that is not there to sum by
        "hethub_run_step / on (run, node) hethub_run_steps",  # or to join on
    ],
)
def test_the_check_of_expressions_finds_what_is_not_registered(wrong):
    with pytest.raises(AssertionError):
        labels_of(wrong, {})


def test_the_check_of_expressions_finds_what_is_no_promql():
    with pytest.raises(ValueError):
        promql_parser.parse("sum by (run (hethub_loss)")


def test_boards_fit_the_types_of_the_sdk(board):
    """No Grafana is at hand to read them."""
    register_default_plugins()
    assert json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)) == board


def test_boards_have_names_of_their_own():
    boards = [json.loads(path.read_text()) for path in FILES]
    assert len({board["uid"] for board in boards}) == len({board["title"] for board in boards}) == len(boards)
    assert [path.stem for path in FILES] == [board["uid"] for board in boards]
    assert all("hethub" in board["tags"] for board in boards)


def test_panels_have_ids_of_their_own(board):
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids) and all(ids)


def test_every_panel_says_what_it_shows_and_how_to_read_it(board):
    for panel in panels(board):
        assert panel["title"] and len(panel["description"]) > 40, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["thresholds"]["steps"], panel["title"]


def test_every_query_takes_its_data_source_from_the_variable(board):
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names[0] == "datasource" and board["templating"]["list"][0]["query"] == "prometheus"
    asking = [*panels(board), *(each for each in board["templating"]["list"] if each["type"] == "query")]
    assert {each["datasource"]["uid"] for each in asking} == {"${datasource}"}
    text = json.dumps(board)
    assert all(f"${name}" in text or f"${{{name}}}" in text for name in names)


def test_every_row_says_whether_devices_are_emulated(board):
    rows = [panel for panel in board["panels"] if panel["type"] == "row"]
    assert rows and all("$what devices" in row["title"] for row in rows)


def test_panels_do_not_lie_on_each_other(board):
    for one, other in combinations([panel["gridPos"] for panel in board["panels"]], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart and one["x"] + one["w"] <= 24


def test_together_they_show_every_metric_of_the_table_but_names_of_things():
    text = " ".join(expression.text for expression in EXPRESSIONS)
    seen = {re.sub("_(sum|count|bucket)$", "", word) for word in re.findall(r"\w+", text)}
    assert set(METRICS) - seen == {
        "hethub_build_info",
        "hethub_device_flops_total",  # MFU shows them
        "hethub_device_peak_flops_per_second",
        "hethub_node_devices",  # TargetMissing asks for it
        "hethub_run_start_timestamp_seconds",
        "hethub_samples_total",
        "hethub_stage_info",
        "hethub_stage_predicted_memory_bytes",
        "hethub_steps_total",
    }


def test_without_the_sdk_the_command_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grafana_foundation_sdk.builders", None)
    result = hethub(capsys, tmp_path, "dashboards", "--output", "out")
    assert result.exit_code == 4
    assert "hethub[dashboards]" in result.err and not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "out").write_text("")
    result = hethub(capsys, tmp_path, "dashboards", "--output", "out")
    assert result.exit_code == 2 and result.err.startswith("hethub: out/")
