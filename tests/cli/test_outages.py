"""`hethub simulate PLAN --faults JOB`: what faults make of a training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.three_types import write_job
from tests.launch.small_job import edit, hethub

FAULT = {"device": "b/0/1", "step": 8, "action": "backward stage 1 micro-batch 1", "do": "kill"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_job(tmp_path, fault=FAULT, on_failure={"restart": "same"})
    return tmp_path


def test_each_failure_is_a_line_and_goodput_the_last(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    result = hethub(capsys, folder, "simulate", "plan.yaml", "--faults", "job.yaml")
    assert result.exit_code == 0, result.err
    lines = result.out.splitlines()
    (failure,) = [line for line in lines if line.startswith("failure\t")]
    assert failure.startswith("failure\tstep 8, b/0/1 (worker): on from step ")
    assert lines[-1].startswith("goodput\t") and lines[-1].endswith("%")
    assert not any(line.startswith("ends\t") for line in lines)


def test_a_run_that_its_policy_ends_is_told(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    write_job(folder, fault=FAULT)
    result = hethub(capsys, folder, "simulate", "plan.yaml", "--faults", "job.yaml")
    assert "ends\tafter 8 steps: on_failure.restart is none" in result.out.splitlines()


def test_a_modelled_second_must_be_known(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    edit(folder / "cluster.yaml", ("time_scale: 5", "time_scale: auto"))
    result = hethub(capsys, folder, "simulate", "plan.yaml", "--faults", "job.yaml")
    assert result.exit_code == 2 and result.out == ""
    assert result.err.startswith(f"hethub: {folder}/cluster.yaml: emulated.time_scale is auto")


def test_a_plan_of_another_cluster_is_refused(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    edit(folder / "cluster.yaml", ("mb_s: 20,", "mb_s: 30,"))
    result = hethub(capsys, folder, "simulate", "plan.yaml", "--faults", "job.yaml")
    assert result.exit_code == 2 and "the plan is not for" in result.err


def test_neither_torch_nor_ray_is_loaded(folder: Path) -> None:
    code = (
        "import sys; from hethub.cli.main import app\n"
        "app(['simulate', 'plan.yaml', '--faults', 'job.yaml'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
