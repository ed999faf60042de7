"""`hethub replan RUN` on run folders whose measured steps are simulated at a known pace."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.launch.run_folder import RunFolder
from hethub.planners.replan import replan
from hethub.program.compile import compile_program
from hethub.simulate.engine import simulate
from hethub.simulate.pace import Pace, at_pace
from hethub.simulate.what_if import with_links
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan, load_plan, save_plan
from hethub.timeline.record import Timeline
from tests.chaos.three_types import plan_by_rows
from tests.launch.small_job import hethub

STEPS = 12


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan_by_rows(tmp_path_factory.mktemp("cluster"))


def simulated(plan: Plan, devices: dict[int, float], links: dict[str, float]) -> Timeline:
    known = ComputeModel(CostGraph(plan.cluster), plan.workload)
    changed = ComputeModel(CostGraph(with_links(plan.cluster, links)), plan.workload)
    program = at_pace(compile_program(lay_out(plan), known), devices)
    found = simulate(program, changed, steps=3).timeline
    assert found is not None
    return found


def write_run(folder: Path, plan: Plan, devices: dict[int, float], links: dict[str, float]) -> Path:
    """A run whose steps are all alike."""
    run = RunFolder(folder / "run")
    run.open({"hethub": "0", "steps": STEPS})
    run.close()
    save_plan(plan, run.path / "plan.yaml")
    simulated(plan, {}, {}).save(run.path / "predicted.npz")
    found = simulated(plan, devices, links)
    step = found.records[found.records["step"] == 0]
    ends = [found.records["end"][found.records["step"] == n].max() for n in (-1, 0)]
    parts = []
    for number in range(STEPS):
        part = step.copy()
        part["step"] = number
        for column in ("start", "end", "sent"):
            part[column] += number * (ends[1] - ends[0])
        parts.append(part)
    info = replace(found.info, origin="measured")
    Timeline(info, np.concatenate(parts)).save(run.path / "measured.npz")
    return run.path


def test_a_slow_device_is_named_and_the_new_plan_is_worth_what_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plan: Plan
) -> None:
    run = write_run(tmp_path, plan, {0: 2.0}, {})
    done = hethub(capsys, tmp_path, "replan", run, "--json")
    assert done.exit_code == 0, done.err
    told = json.loads(done.out)
    assert told["devices"] == pytest.approx({"a/0/0": 2.0}) and told["links"] == {}
    assert told["calibrated_step_seconds"] == pytest.approx(told["measured_step_seconds"], rel=0.01)
    new, _ = load_plan(Path(told["plan"]))
    assert new.cluster == plan.cluster  # so that the job takes it
    assert told["gain"] > 0.05
    again = simulated(new, {0: 2.0}, {}).records
    ends = [again["end"][again["step"] == n].max() for n in (-1, 0)]
    assert told["new_step_seconds"] == pytest.approx(ends[1] - ends[0])


def test_a_slow_link_is_named_in_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plan: Plan
) -> None:
    run = write_run(tmp_path, plan, {}, {"desk-shelf": 0.25})
    done = hethub(capsys, tmp_path, "replan", run, "--output", tmp_path / "new.yaml")
    assert done.exit_code == 0, done.err
    assert "link\tdesk-shelf: messages take" in done.out and "device\t" not in done.out
    assert "25% of its bandwidth is left" in done.out
    assert "more tokens per second" in done.out
    assert f"hethub launch --resume {run} --plan {tmp_path / 'new.yaml'}" in done.out
    assert (tmp_path / "new.yaml").is_file()
    assert "cannot be read" in done.err  # the job file, which this run never had


def test_a_run_as_predicted_gets_no_new_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plan: Plan
) -> None:
    as_predicted = Pace({device.name: 1.0 for device in plan.cluster.devices()})
    run = write_run(tmp_path, replan(plan, as_predicted).plan, {}, {})
    done = hethub(capsys, tmp_path, "replan", run)
    assert done.exit_code == 0 and "devices, links\tas predicted" in done.out
    assert "new plan\tnone" in done.out and not (run / "replan.yaml").exists()


def test_a_folder_without_measured_steps_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plan: Plan
) -> None:
    run = write_run(tmp_path, plan, {}, {})
    (run / "measured.npz").unlink()
    done = hethub(capsys, tmp_path, "replan", run)
    assert done.exit_code == 2 and "measured.npz" in done.err
