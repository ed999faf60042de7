from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hethub.cli.main import app
from hethub.errors import InputError
from hethub.simulate.engine_calibration import platforms
from hethub.simulate.imported_runs import load_runs
from hethub.simulate.validation import load_calibration

DEVICE, OTHER = "TITAN-RTX", "RTX-2080Ti"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path):
    """A folder like Sailor's tables: layers of 10 + 20 ms a row, one-stage runs that took twice as long."""
    head = "model,device_type,tensor_parallel,micro_batch,layer_kind,forward_ms,backward_ms,optimizer_step_ms"
    layers = [f"{head},parameters,origin"]
    for kind in ("embedding", "decoder_first", "decoder", "head"):
        layers += [
            f"OPT-350M,{DEVICE},1,{rows},{kind},{10 * rows},{20 * rows},2,1000,measured" for rows in (1, 2)
        ]
        layers.append(f"OPT-350M,{DEVICE},1,1,{kind},1,1,2,1000,hand_edited")
    (tmp_path / "layer_profiles.csv").write_text("\n".join(layers) + "\n")
    (tmp_path / "collective_times.csv").write_text("device_type,collective,devices,message_mib,time_ms\n")
    (tmp_path / "link_bandwidth.csv").write_text(
        "scope,cluster,sender_device_type,sender_gpus,receiver_device_type,coef_log2_squared,coef_log2,"
        "coef_constant,max_measured_gb_per_s\n"
        + "".join(f"{scope}_node,mit,{DEVICE},1,{DEVICE},0,0,1,1\n" for scope in ("intra", "inter"))
    )
    runs = [run(f"one-{n}", micro_batches=n, seconds=2 * n * (26 * 0.01 + 25 * 0.02)) for n in range(8, 15)]
    (tmp_path / "measured_runs.json").write_text(json.dumps({"runs": runs}))
    return tmp_path


def run(name, *, micro_batches, seconds, device=DEVICE):
    replica = {"count": 1, "device_type": device}
    return {
        "run_id": name,
        "tensor_parallel": 1,
        "sequence_length": 2048,
        "micro_batch": 1,
        "micro_batches_per_replica": micro_batches,
        "plan": {"stages": [{"layers": [0, 26], "replicas": [replica]}]},
        "measured_iteration_s": seconds,
        "measured_peak_memory_mib": 20000,
    }


def test_validate_prints_every_run_and_the_means(data):
    answer = json.loads(call("validate", data, "--json").stdout)
    assert len(answer["real"]["runs"]) == 7
    assert answer["real"]["time_mean_abs_error"] == pytest.approx(0.5, abs=0.03)
    assert answer["real"]["runs"][0]["time_error"] == pytest.approx(-0.5, abs=0.03)
    assert answer["emulated"]["runs"] == []
    lines = call("validate", data).stdout.splitlines()
    assert lines[0].split("\t")[0] == "run" and lines[-1].startswith("# real time_max_abs_error")


def test_imported_profiles_predict_what_the_tables_do(data, tmp_path):
    assert call("profile", "import", data, tmp_path / "own").exit_code == 0
    direct = json.loads(call("validate", data, "--json").stdout)
    again = json.loads(call("validate", data, "--profiles", tmp_path / "own", "--json").stdout)
    assert again["real"]["time_mean_abs_error"] == pytest.approx(direct["real"]["time_mean_abs_error"])


def test_a_plot_holds_every_run(data, tmp_path):
    assert call("validate", data, "--html", tmp_path / "plot.html").exit_code == 0
    page = (tmp_path / "plot.html").read_text()
    assert all(f"one-{n}: " in page for n in range(8, 15))


def test_calibration_finds_the_slow_device_and_predictions_use_it(data, tmp_path):
    """One type alone has no message to receive, so nothing tells the pause: it is refused, with its name."""
    refused = call("calibrate", data, "--output", tmp_path / "c.json")
    assert isinstance(refused.exception, InputError)
    assert "no run depends on host_pause_seconds" in refused.exception.message
    written = {"coefficients": {f"slow_down.{DEVICE}": {"value": 2.0}}}
    (tmp_path / "c.json").write_text(json.dumps(written))
    answer = json.loads(call("validate", data, "--calibration", tmp_path / "c.json", "--json").stdout)
    assert answer["real"]["time_mean_abs_error"] < 0.03


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"coefficients": {"slow_down.A": {"value": -1}}}', '{"coefficients": {"x": {"value": 1}}}'],
)
def test_a_file_that_is_no_calibration_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(InputError, match=r"c\.json"):
        load_calibration(tmp_path / "c.json")


def test_device_types_that_runs_share_are_one_platform(data, tmp_path):
    entries = [run("a", micro_batches=1, seconds=1), run("b", micro_batches=1, seconds=1, device=OTHER)]
    (tmp_path / "measured_runs.json").write_text(json.dumps({"runs": entries}))
    runs = load_runs(tmp_path / "measured_runs.json")
    assert platforms(runs) == (frozenset({DEVICE}), frozenset({OTHER}))


@pytest.mark.parametrize(
    ("doubts", "is_doubtful"),
    [
        ([], False),
        (["peak memory: a copy"], False),
        (["peak memory: a copy", "another plan has these"], True),
    ],
)
def test_a_run_is_doubtful_where_not_only_one_of_its_other_fields_is(tmp_path, doubts, is_doubtful):
    entry = run("a", micro_batches=1, seconds=1) | {"doubtful": doubts}
    (tmp_path / "measured_runs.json").write_text(json.dumps({"runs": [entry]}))
    assert load_runs(tmp_path / "measured_runs.json")[0].is_doubtful is is_doubtful


def test_a_folder_without_runs_is_named(tmp_path):
    result = call("validate", tmp_path)
    assert isinstance(result.exception, InputError)
    assert str(tmp_path) in result.exception.message


@pytest.mark.parametrize(
    ("replica", "what"), [({"tensor_parallel": 2}, "tensor_parallel"), ({"micro_batch": 2}, "micro_batch")]
)
def test_a_run_whose_replicas_differ_is_refused_not_misread(tmp_path, replica, what):
    entry = run("mixed", micro_batches=1, seconds=1)
    entry["plan"]["stages"][0]["replicas"][0] |= replica
    (tmp_path / "measured_runs.json").write_text(json.dumps({"runs": [entry]}))
    with pytest.raises(InputError, match=f"mixed plan.stages.0.: a replica's {what}"):
        load_runs(tmp_path / "measured_runs.json")
