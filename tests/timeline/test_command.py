from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from hethub.cli import timeline as module
from hethub.errors import InputError
from hethub.specs.plan import save_plan
from tests.plan_strategies import NAMED_PLANS, three_speeds


@pytest.fixture
def run(tmp_path, timeline, rows):
    """The folder of an emulated run of five steps, the last of them slow."""
    folder = tmp_path / "first"
    folder.mkdir()
    timeline(rows(0, 0.0), origin="predicted").save(folder / "predicted.npz")
    starts = (0.0, 10.0, 20.0, 30.0, 44.0)
    steps = [row for step, start in enumerate(starts) for row in rows(step, start)]
    timeline(steps, emulated=True, time_scale=4.0).save(folder / "measured.npz")
    return folder


def call(*arguments):
    app = typer.Typer()
    app.command()(module.timeline)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_piped_output_is_tab_separated_and_leaves_out_the_warm_up(run):
    lines = [line.split("\t") for line in call(run).stdout.splitlines()]
    facts = {line[0]: line[1:] for line in lines if line[0].startswith("#")}
    assert facts["# emulated"] == ["time_scale", "4"]
    assert facts["# steps"] == ["3", "4"]
    assert facts["# predicted_step_seconds"] == ["10"]
    assert facts["# measured_step_seconds"] == ["12"]
    header, first, second = lines[len(facts) :]
    assert len(header) == len(first) == len(second) == 14
    assert dict(zip(header, first, strict=True))["predicted_busy_ratio"] == "0.3500"


def test_equal_records_give_equal_columns(run):
    answer = json.loads(call(run, "--step", 1, "--json").stdout)
    assert answer["predicted"]["step_seconds"] == answer["measured"]["step_seconds"] == 10.0
    for name, value in answer["predicted"]["devices"][0].items():
        assert answer["measured"]["devices"][0][name] == (
            pytest.approx(value, abs=1e-12) if name.endswith("ratio") else value
        )


def test_json_is_one_object_marked_emulated(run):
    answer = json.loads(call(run, "--json").stdout)
    assert (answer["emulated"], answer["time_scale"]) == (True, 4.0)
    assert (answer["first_step"], answer["last_step"]) == (3, 4)
    assert [one["device_type"] for one in answer["measured"]["device_types"]] == ["fast", "slow"]


def test_a_terminal_gets_a_table(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")  # no escape codes, 80 columns
    module.timeline(run)
    text = capsys.readouterr().out
    assert "first, steps 3 to 4 (emulated: modelled time)" in text
    assert "step time: 10 s predicted, 12 s measured (median), +20.0 %" in text
    assert "35.0/29.2" in text
    assert max(len(line) for line in text.splitlines()[4:]) <= 80


def test_the_waterfall_names_every_cause_and_adds_up(run):
    lines = [line.split("\t") for line in call(run, "--waterfall").stdout.splitlines()]
    header, *causes = [line for line in lines if not line[0].startswith("#")]
    assert header == ["cause", "predicted", "measured", "meaning"]
    for column in (1, 2):
        assert sum(float(line[column]) for line in causes) == pytest.approx(1.0, abs=1e-3)
    answer = json.loads(call(run, "--json").stdout)["waterfall"]
    assert list(answer["measured"]["total"]) == [line[0] for line in causes]


def test_the_waterfall_weighs_devices_by_the_plan(run):
    alike = json.loads(call(run, "--json").stdout)["waterfall"]["predicted"]
    cluster = three_speeds()
    plan = next(iter(NAMED_PLANS.values()))("fp32").model_copy(update={"cluster": cluster})
    save_plan(plan, run / "plan.yaml")
    weighed = json.loads(call(run, "--json").stdout)["waterfall"]["predicted"]
    assert weighed["devices"] == alike["devices"]
    first, second = (device["busy"] for device in alike["devices"])
    assert weighed["total"]["busy"] != pytest.approx(alike["total"]["busy"])
    assert min(first, second) < weighed["total"]["busy"] < max(first, second)


def test_the_waterfall_fits_a_terminal(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    module.timeline(run, waterfall=True)
    text = capsys.readouterr().out
    assert "waits inside the pipeline" in text
    assert max(len(line) for line in text.splitlines()[4:]) <= 80


def test_pictures_are_written_where_asked(run, tmp_path):
    pytest.importorskip("plotly")
    result = call(run, "--html", tmp_path / "chart.html", "--trace", tmp_path / "trace.json", "--json")
    json.loads(result.stdout)
    assert "measured step 3" in (tmp_path / "chart.html").read_text()
    steps = {
        event["args"].get("step")
        for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        if event["ph"] == "X" and event["pid"] == 2
    }
    assert steps == {3, 4}


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda run: run / "absent", "no such folder"),
        (lambda run: run.parent, r"holds no predicted\.npz"),
        (lambda run: (run / "measured.npz").write_bytes(b"torn") and run, "not a timeline file"),
    ],
)
def test_what_is_not_a_run_is_refused(run, arrange, message):
    with pytest.raises(InputError, match=message):
        module.timeline(arrange(run))


def test_a_step_that_was_not_run_is_refused(run):
    with pytest.raises(InputError, match="step 9: not in the timeline"):
        module.timeline(run, step=9)


def test_a_picture_in_no_folder_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        module.timeline(run, trace=tmp_path / "no" / "trace.json")
