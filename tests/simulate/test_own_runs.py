from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hethub.cli.main import app
from hethub.cost.compute import ComputeModel
from hethub.cost.engine_prices import Coefficients
from hethub.cost.graph import CostGraph
from hethub.errors import InputError
from hethub.program.compile import compile_program
from hethub.simulate.engine import simulate
from hethub.simulate.own_calibration import calibrate_own_runs
from hethub.simulate.validation import OwnRun, check_own_run, load_own_run, own_step_seconds
from hethub.specs.layout import lay_out
from hethub.specs.plan import save_plan
from tests.plan_strategies import NAMED_PLANS

TRUE = {"fast": 1.3, "middle": 0.8, "slow": 1.1}
NAMES = sorted(NAMED_PLANS)[:14]


def recorded(plan):
    compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
    timeline = simulate(compile_program(lay_out(plan), compute), compute, steps=3).timeline
    assert timeline is not None
    return timeline


def as_run(name, slow):
    """A run of a named plan on devices that are slower than their figures by `slow`."""
    plan = NAMED_PLANS[name]()
    timeline = recorded(plan)
    return OwnRun(name, plan, timeline, timeline, 0, 0, own_step_seconds(plan, slow))


def test_slow_devices_are_found_from_their_runs():
    """Seeded bug: efficiencies multiplied by the slow-down; the fit went the other way."""
    found = calibrate_own_runs([as_run(name, TRUE) for name in NAMES])
    values = dict(zip(found.names, found.values, strict=True))
    for name, slow in TRUE.items():
        assert values[f"slow_down.{name}"] == pytest.approx(slow, rel=0.03)
    assert max(map(abs, found.left_out_errors)) < 0.05


def test_a_run_is_checked_under_its_own_prediction_or_under_a_calibration():
    run = as_run("pipeline of 2", TRUE)
    assert abs(check_own_run(run).time_error) > 0.05
    assert check_own_run(run, Coefficients(slow_down=TRUE)).time_error == pytest.approx(0)


def test_terms_add_up_to_what_the_step_is_off_by(tmp_path):
    """Equal timelines differ in nothing."""
    plan = NAMED_PLANS["rows 3 + 1"]()
    save_plan(plan, tmp_path / "plan.yaml")
    for name in ("predicted", "measured"):
        recorded(plan).save(tmp_path / f"{name}.npz")
    check = check_own_run(load_own_run(tmp_path))
    assert check.memory_error is None
    assert sum(check.terms.values()) == pytest.approx(
        check.measured_seconds - check.predicted_seconds, abs=1e-9
    )


def test_a_folder_that_lacks_a_timeline_is_refused(tmp_path):
    save_plan(NAMED_PLANS["single device"](), tmp_path / "plan.yaml")
    with pytest.raises(InputError, match="predicted"):
        load_own_run(tmp_path)


def test_simulate_reads_a_calibration_and_says_what_it_lacks(tmp_path):
    save_plan(NAMED_PLANS["single device"](), tmp_path / "plan.yaml")
    (tmp_path / "c.json").write_text(json.dumps({"coefficients": {"slow_down.fast": {"value": 2.0}}}))
    plain = CliRunner().invoke(app, ["simulate", str(tmp_path / "plan.yaml"), "--json"])
    slow = CliRunner().invoke(
        app, ["simulate", str(tmp_path / "plan.yaml"), "--json", "--calibration", str(tmp_path / "c.json")]
    )
    plain_seconds, slow_seconds = (json.loads(r.stdout)["step_seconds"] for r in (plain, slow))
    assert slow_seconds == pytest.approx(2 * plain_seconds, rel=1e-6)
    assert "has nothing on middle, slow" in slow.stderr
