"""The `hethub` command as a whole: its commands, their help, its version and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import hethub as package
from hethub.errors import HetHubError, InfeasibleError, InputError, MachineError, RunError
from tests.launch.small_job import hethub

COMMANDS = (
    "plan", "simulate", "launch", "runs", "status", "logs", "stop", "top", "timeline", "report", "replan", "schema",
    "data build",
)  # fmt: skip


def test_help_lists_every_command(capsys, tmp_path):
    out = hethub(capsys, tmp_path, "--help").out
    assert all(command.split()[0] in out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(capsys, tmp_path, command):
    result = hethub(capsys, tmp_path, *command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: hethub {command} " in " ".join(result.out.split())


def test_the_version_is_the_packages(capsys, tmp_path):
    assert hethub(capsys, tmp_path, "--version").out == f"hethub {package.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["plna"], ["plan"], ["plan", "x.yaml", "--fast"], ["schema", "clutser"]]
)
def test_a_wrong_call_exits_with_2(capsys, tmp_path, arguments):
    result = hethub(capsys, tmp_path, *arguments)
    assert (result.exit_code, result.out) == (2, "")


@pytest.mark.parametrize("command", ["plan", "simulate", "launch"])
def test_a_file_that_is_not_there_is_named(capsys, tmp_path, command):
    result = hethub(capsys, tmp_path, command, "no.yaml")
    assert result.exit_code == 2
    assert result.err.startswith("hethub: no.yaml") and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("which", ["cluster", "workload", "job", "plan"])
def test_every_key_of_a_schema_has_a_description(capsys, tmp_path, which):
    schema = json.loads(hethub(capsys, tmp_path, "schema", which).out)
    models = [schema, *schema.get("$defs", {}).values()]
    keys = {key: value for model in models for key, value in model.get("properties", {}).items()}
    assert keys and all("description" in value for value in keys.values())


def test_exit_codes_are_the_promised_ones():
    kinds = (HetHubError, RunError, InputError, InfeasibleError, MachineError)
    assert [kind.exit_code for kind in kinds] == [1, 1, 2, 3, 4]


def test_help_loads_no_library_of_the_commands():
    code = "import sys, hethub.cli.main; print([m for m in ('numpy', 'torch', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_reader_who_has_had_enough_is_no_failure():
    """As of `| head -1`. Seeded bug: Typer ends with 1 before any handler of ours is asked."""
    theirs, ours = os.pipe()
    os.close(theirs)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hethub", "schema", "cluster"],
            stdout=ours,
            stderr=subprocess.PIPE,
            check=False,
        )
    finally:
        os.close(ours)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("arguments", [["--version"], ["schema", "cluster"]])
def test_a_full_disk_is_one_line(arguments):
    """Seen to catch: a traceback."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hethub", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 4
    assert len(done.stderr.splitlines()) == 1 and "No space left on device" in done.stderr
