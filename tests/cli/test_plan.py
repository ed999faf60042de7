"""`hethub plan` and `hethub simulate`: what they print, what they write, what they load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hethub.cli.main import app
from hethub.cost.profiles.profile import LayerRow, Profile, save_profile
from hethub.errors import InfeasibleError, InputError
from hethub.program.check import check_plan
from hethub.specs.plan import load_plan

LAPTOP = Path(__file__).parents[2] / "cluster_specs" / "laptop.yaml"
KEYS = {
    "": {
        "step_seconds", "step_seconds_interval_95", "tokens_per_second", "bounds", "share", "device_types",
        "joules_per_token", "usd_per_million_tokens", "search", "baselines", "missing", "emulated", "plan",
    },
    "bounds": {"homogeneous_tokens_per_second", "physical_tokens_per_second"},
    "share": {"homogeneous_bound", "physical_bound", "not_a_bound"},
    "search": {
        "seconds", "considered", "proven_gap", "proven_by", "loose", "closed_form_seconds", "lower_bound_seconds",
        "worth", "runners_up",
    },
    "baselines": {"even_tokens_per_second"},
}  # fmt: skip
DEVICE_TYPE_KEYS = {
    "name", "count", "used", "busy_ratio", "exposed_communication_ratio", "bubble_ratio", "peak_memory_bytes",
    "memory_bytes",
}  # fmt: skip


def _run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """What `hethub plan --json` says of the laptop cluster."""
    found: dict[str, Any] = json.loads(_run("plan", LAPTOP, "--json"))
    return found


def test_the_json_has_every_key_and_a_reason_for_every_null(figures: dict[str, Any]) -> None:
    for key, expected in KEYS.items():
        assert set(figures[key] if key else figures) == expected
    for entry in figures["device_types"]:
        assert set(entry) == DEVICE_TYPE_KEYS
    nulls = {f"{k}.{n}" for k in ("bounds", "share", "baselines") for n, v in figures[k].items() if v is None}
    nulls |= {key for key, value in figures.items() if value is None}
    assert nulls == set(figures["missing"])


def test_figures_agree_with_each_other(figures: dict[str, Any]) -> None:
    speed = figures["tokens_per_second"]
    workload = figures["plan"]["workload"]
    tokens = workload["global_batch"] * workload["sequence_length"]
    assert speed == pytest.approx(tokens / figures["step_seconds"])
    for name in ("homogeneous", "physical"):
        share = figures["share"][f"{name}_bound"]
        assert share == pytest.approx(speed / figures["bounds"][f"{name}_tokens_per_second"])
    search = figures["search"]
    gap = 1 - search["lower_bound_seconds"] / search["closed_form_seconds"]
    assert search["proven_gap"] == pytest.approx(gap)
    assert speed > figures["baselines"]["even_tokens_per_second"]
    assert figures["emulated"] is True
    for entry in figures["device_types"]:
        assert 0 < entry["peak_memory_bytes"] <= entry["memory_bytes"]
        assert entry["busy_ratio"] + entry["exposed_communication_ratio"] + entry["bubble_ratio"] <= 1 + 1e-9


def test_json_writes_no_plan_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _run("plan", LAPTOP, "--json")
    assert list(tmp_path.iterdir()) == []
    _run("plan", LAPTOP, "--json", "--output", "mine.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_the_plan_file_is_valid_and_simulates_to_the_same_figures(
    tmp_path: Path, figures: dict[str, Any]
) -> None:
    path = tmp_path / "plan.yaml"
    text = _run("plan", LAPTOP, "--output", path)
    plan, _ = load_plan(path)
    assert check_plan(plan) == []
    again = json.loads(_run("simulate", path, "--json"))
    assert again["missing"].keys() == figures["missing"].keys()
    for key in ("step_seconds", "tokens_per_second", "bounds", "share", "baselines", "device_types"):
        assert again[key] == figures[key]
    header, first = text.splitlines()[1:3]
    assert len(header.split("\t")) == len(first.split("\t"))
    assert "best even split" in text and "homogeneous bound" in text and "runner-up" in text


def test_a_trace_of_the_step_is_written(tmp_path: Path) -> None:
    path, trace = tmp_path / "plan.yaml", tmp_path / "step.json"
    _run("plan", LAPTOP, "--output", path)
    _run("simulate", path, "--trace", trace)
    assert json.loads(trace.read_text())["traceEvents"]


def _edited(tmp_path: Path, old: str, new: str) -> Path:
    """The laptop cluster with a change, its model found from here."""
    text = LAPTOP.read_text().replace("laptop-model/", f"{LAPTOP.parent}/laptop-model/")
    path = tmp_path / "cluster.yaml"
    path.write_text(text.replace(old, new))
    assert old in text
    return path


def test_bad_input_is_one_error_and_nothing_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = _edited(tmp_path, "device_type: middle", "device_type: midle")
    with pytest.raises(InputError, match=r"cluster\.yaml:\d+:\d+ .*middle"):
        _run("plan", cluster)
    with pytest.raises(InputError, match="does not exist"):
        _run("plan", LAPTOP, "--output", "nowhere/plan.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"]


def test_a_model_that_fits_nowhere_ends_with_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster = _edited(tmp_path, "sequence_length: 64", "sequence_length: 4096")
    with pytest.raises(InfeasibleError, match=r"MiB short"):
        _run("plan", cluster)
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.yaml"]


def test_planning_loads_neither_torch_nor_ray_nor_a_solver_nor_plots(tmp_path: Path) -> None:
    script = (
        "import sys; from hethub.cli.main import run\n"
        "sys.argv = ['hethub', 'plan', sys.argv[1], '--output', sys.argv[2]]\n"
        "try: run()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'scipy', 'plotly', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, LAPTOP, tmp_path / "plan.yaml"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.yaml").exists()


@pytest.fixture(scope="module")
def laptop_plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The laptop's plan file."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    _run("plan", LAPTOP, "-o", path)
    return path


def test_simulate_says_what_a_change_and_a_job_would_be(laptop_plan: Path) -> None:
    as_is = json.loads(_run("simulate", laptop_plan, "--json", "--tokens", "3.6e6"))
    slower = json.loads(_run("simulate", laptop_plan, "--json", "--what-if", "type:fast=0.5x"))
    assert slower["step_seconds"] > as_is["step_seconds"]
    assert slower["bounds"]["physical_tokens_per_second"] < as_is["bounds"]["physical_tokens_per_second"]
    assert slower["bounds"]["homogeneous_tokens_per_second"] is None
    assert as_is["job"]["hours"] == pytest.approx(1000 / as_is["tokens_per_second"])
    assert sum(as_is["waterfall"].values()) == pytest.approx(1.0)
    assert "homogeneous" in _run("simulate", laptop_plan, "--what-if", "type:fast=0.5x", "--waterfall")


def test_bound_derives_both_bounds(figures: dict[str, Any]) -> None:
    found = json.loads(_run("bound", LAPTOP, "--json"))
    for kind in ("embedding", "decoder", "head"):
        assert sum(split[kind] for split in found["physical"]["split"].values()) == pytest.approx(1.0)
    assert found["bounds"] == figures["bounds"]
    alone = [entry["tokens_per_second"] for entry in found["homogeneous"]["types"]]
    assert sum(alone) == pytest.approx(found["bounds"]["homogeneous_tokens_per_second"])
    assert found["homogeneous"]["tokens_per_second"] == pytest.approx(sum(alone))
    assert found["homogeneous"]["not_a_bound"] == []
    assert sum(found["waterfall"].values()) == pytest.approx(1.0)
    text = _run("bound", LAPTOP)
    assert "physical bound\t" in text
    assert "imbalance\t" in text


def test_measured_layers_set_the_time_and_what_they_lack_is_told(laptop_plan: Path, tmp_path: Path) -> None:
    plan, _ = load_plan(laptop_plan)
    before = json.loads(_run("simulate", laptop_plan, "--json"))
    workload = plan.workload
    rows = tuple(
        LayerRow(
            model=workload.model.name,
            device_type=name,
            layer_kind="decoder",
            tensor_parallel=1,
            micro_batch=1,
            sequence_length=workload.sequence_length,
            dtype=workload.precision,
            forward_seconds=10.0,
            backward_seconds=20.0,
        )
        for name in plan.cluster.device_types
    )
    save_profile(Profile(rows, ()), tmp_path)
    result = CliRunner().invoke(app, ["simulate", str(laptop_plan), "--json", "--profiles", str(tmp_path)])
    assert "no embedding on fast" in result.stderr
    assert json.loads(result.stdout)["step_seconds"] > max(10.0, before["step_seconds"])
    with pytest.raises(InputError, match="embedding on fast"):
        _run("simulate", laptop_plan, "--profiles", tmp_path, "--strict")


def _measured_types(folder: Path, seconds: dict[str, float], spread: float) -> Path:
    """A profile of the laptop's model in which a decoder's forward takes so long on each type."""
    plan = json.loads(_run("plan", LAPTOP, "--json"))["plan"]
    workload = plan["workload"]
    rows = tuple(
        LayerRow(
            model=workload["model"]["name"], device_type=name, layer_kind=kind, tensor_parallel=1, micro_batch=rows,
            sequence_length=workload["sequence_length"], dtype="fp32", forward_seconds=rows * forward / part,
            backward_seconds=2 * rows * forward / part, spread=spread,
        )
        for name, forward in seconds.items()
        for kind, part in (("embedding", 10), ("decoder", 1), ("head", 1))
        for rows in (1, 4)
    )  # fmt: skip
    save_profile(Profile(rows, ()), folder)
    return folder


def _layers_by_type(plan: dict[str, Any], types: dict[str, str]) -> dict[str, float]:
    """Layers x rows of a step that each type does, over its devices."""
    found: dict[str, float] = {}
    for pipeline in plan["pipelines"]:
        for stage in pipeline["stages"]:
            for replica in stage["replicas"]:
                for rank in replica["ranks"]:
                    name = types[(rank.get("device") or rank["devices"]).split("/")[0]]
                    work = (stage["layers"][1] - stage["layers"][0]) * replica["rows"] / len(replica["ranks"])
                    found[name] = found.get(name, 0.0) + work * pipeline["micro_batches"]
    return found


def test_plan_gives_layers_to_the_types_that_were_measured_quick(tmp_path: Path) -> None:
    """Catalog figures say that `slow` is slow; a profile that says the reverse turns the split around, and its spread
    gives the step an interval."""
    profiles = _measured_types(tmp_path, {"fast": 0.2, "middle": 0.04, "slow": 0.01}, spread=0.1)
    plain = json.loads(_run("plan", LAPTOP, "--json"))
    found = json.loads(_run("plan", LAPTOP, "--json", "--profiles", profiles, "--strict"))
    types = {name: name for name in ("fast", "middle", "slow")}
    before, after = (_layers_by_type(figures["plan"], types) for figures in (plain, found))
    assert after["slow"] / after.get("fast", 1e-9) > 2 * before["slow"] / before["fast"]
    low, high = found["step_seconds_interval_95"]
    assert low * high == pytest.approx(found["step_seconds"] ** 2)
    assert high / found["step_seconds"] == pytest.approx(1 + 0.1 * 1.96 / 1.349)
    assert found["plan"]["prediction"]["step_seconds_interval_95"] == found["step_seconds_interval_95"]
    assert found["share"]["physical_bound"] <= 1.0


def test_further_devices_are_planned_anew(laptop_plan: Path) -> None:
    before = json.loads(_run("simulate", laptop_plan, "--json"))
    after = json.loads(_run("simulate", laptop_plan, "--json", "--what-if", "type:fast=+3"))
    counts = {entry["name"]: entry["count"] for entry in before["device_types"]}
    assert {e["name"]: e["count"] for e in after["device_types"]} == counts | {"fast": counts["fast"] + 3}
    assert after["tokens_per_second"] > 1.1 * before["tokens_per_second"]
    both = ("--what-if", "type:fast=+3", "--what-if", "type:fast=0.5x")
    slower = json.loads(_run("simulate", laptop_plan, "--json", *both))
    assert slower["tokens_per_second"] < after["tokens_per_second"]


def test_a_search_without_time_ends_with_the_first_plan_and_says_nothing_false(
    tmp_path: Path, figures: dict[str, Any]
) -> None:
    """Seen to catch: "constraints.max_pipeline cannot hold", and types that cannot hold the model (a real bug)."""
    cluster = _edited(tmp_path, "emulated:", "constraints: {max_pipeline: 4}\nemulated:")
    found = json.loads(_run("plan", cluster, "--time-limit", "0", "--json"))
    assert all(len(pipeline["stages"]) <= 4 for pipeline in found["plan"]["pipelines"])
    assert found["share"]["not_a_bound"] == figures["share"]["not_a_bound"]
