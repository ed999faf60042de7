"""`hethub checkpoint` over the folder of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.checkpoints.made import known_numbers, make_checkpoint
from tests.launch.small_job import hethub, listing
from tests.plan_strategies import compile_plan, six_plans

PLAN = six_plans()["unequal heads"]
PROGRAM = compile_plan(PLAN)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints after steps 5 and 10, the newer one damaged."""
    for step in (5, 10):
        make_checkpoint(tmp_path / "run" / "checkpoints", PLAN, PROGRAM, step)
    file = tmp_path / "run" / "checkpoints" / "step-00000010" / "a-0-0.state"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    return tmp_path / "run"


@pytest.mark.parametrize("command", ["list", "verify", "export"])
def test_help_shows_an_example(capsys, tmp_path, command):
    assert f"Example: hethub checkpoint {command} runs/demo" in " ".join(
        hethub(capsys, tmp_path, "checkpoint", command, "--help").out.split()
    )


def test_list_tells_what_is_there(capsys, run):
    answer = json.loads(hethub(capsys, run.parent, "checkpoint", "list", "run", "--json").out)
    assert [(one["step"], one["files"], one["attempt"]) for one in answer["checkpoints"]] == [
        (10, 2, 1),
        (5, 2, 1),
    ]
    text = hethub(capsys, run.parent, "checkpoint", "list", "run")
    assert text.exit_code == 0 and [line.split("\t")[0] for line in text.out.splitlines()] == [
        "step 10",
        "step 5",
    ]


def test_list_tells_why_a_folder_is_no_checkpoint(capsys, run):
    (run / "checkpoints" / "step-00000010" / "manifest").unlink()
    result = hethub(capsys, run.parent, "checkpoint", "list", "run")
    assert "step 10\trun/checkpoints/step-00000010/manifest: no manifest" in result.out


def test_verify_names_the_damage_and_fails(capsys, run):
    before = listing(run)
    result = hethub(capsys, run.parent, "checkpoint", "verify", "run")
    assert result.exit_code == 2
    assert result.out.startswith("step 5\tintact, ")
    assert "a-0-0.state: is damaged between bytes 0 and 4096." in result.err
    assert hethub(capsys, run.parent, "checkpoint", "verify", "run", "--step", 5).exit_code == 0
    assert listing(run) == before


def test_export_writes_the_weights_under_their_own_names(capsys, run):
    result = hethub(capsys, run.parent, "checkpoint", "export", "run", "--step", 5, "--output", "llama")
    assert result.exit_code == 0, result.err
    weights = load_file(run.parent / "llama" / "model.safetensors")
    numbers = known_numbers(PROGRAM.ownership.parameters)
    assert weights.keys() == {p.name for p in PROGRAM.ownership.parameters}
    for number, parameter in enumerate(PROGRAM.ownership.parameters):
        assert (weights[parameter.name] == numbers[0, number]).all()
    assert json.loads((run.parent / "llama" / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_damaged_checkpoint_is_not_exported(capsys, run):
    result = hethub(capsys, run.parent, "checkpoint", "export", "run", "--output", "llama")
    assert result.exit_code == 2 and "is damaged" in result.err
    assert not (run.parent / "llama").exists()


@pytest.mark.parametrize("command", [["list"], ["verify"], ["export", "--output", "llama"]])
def test_a_folder_without_checkpoints_is_told(capsys, tmp_path, command):
    name, *options = command
    result = hethub(capsys, tmp_path, "checkpoint", name, "nothing", *options)
    assert (result.exit_code, result.out) == (2, "")
    assert result.err.startswith("hethub: nothing: holds no checkpoint. ")


def test_a_step_that_is_not_there_is_told(capsys, run):
    result = hethub(capsys, run.parent, "checkpoint", "export", "run", "--step", 7, "--output", "llama")
    assert result.exit_code == 2 and "folders of steps 10, 5." in result.err


def test_resume_wants_the_folder_of_an_unfinished_run(capsys, tmp_path):
    result = hethub(capsys, tmp_path, "launch", "--resume", "nothing")
    assert (result.exit_code, result.err) == (
        2,
        "hethub: nothing: is no folder of a run. Give one that `hethub launch` made.\n",
    )
    assert hethub(capsys, tmp_path, "launch").exit_code == 2


def test_export_without_its_package_names_the_extra(capsys, run, monkeypatch):
    """Seeded bug: a traceback."""
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    result = hethub(capsys, run.parent, "checkpoint", "export", "run", "--output", "llama")
    assert result.exit_code == 4
    assert result.err == (
        "hethub: safetensors: not installed, the export needs it. Install the extra: pip install 'hethub[launch]'.\n"
    )
    assert not (run.parent / "llama").exists()
