"""`hethub top` on a run that ends while it is watched; `tests/launch/test_top.py` has one that goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hethub.cli import top
from hethub.files import write_json
from hethub.launch.run_folder import SUMMARY, RunFolder
from hethub.telemetry.folder import TARGETS, TELEMETRY, write_targets
from tests.launch.small_job import hethub


@pytest.fixture
def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that goes on. When `top` has waited once its endpoints are gone, which a driver takes back when training is
    done; when it has waited once more, the run has ended."""
    held = RunFolder(tmp_path / "run")
    held.open({"steps": 9})
    targets = held.path / TELEMETRY / TARGETS
    write_targets(targets, "run", {"driver": "127.0.0.1:9"})

    def end() -> None:
        write_json(held.path / SUMMARY, {})
        held.close()

    coming = iter((targets.unlink, end))
    passing = SimpleNamespace(sleep=lambda _: next(coming)(), monotonic=time.monotonic)
    monkeypatch.setattr(top, "time", passing)
    return held.path


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_run_that_ends_between_the_looks_is_told_as_ended(
    capsys: pytest.CaptureFixture[str], ending: Path, arguments: tuple[str, ...]
) -> None:
    """Seen to catch: exit code 2, since the run names no endpoints while it writes its last files."""
    told = hethub(capsys, ending.parent, "top", "run", *arguments)
    assert told.exit_code == 0, told.err
    if arguments:
        assert json.loads(told.out)["state"] == "finished"
    else:
        assert "state\tfinished" in told.out.splitlines()


@pytest.mark.usefixtures("capsys")
def test_the_live_view_ends_with_the_run(ending: Path) -> None:
    """Seen to catch: exit code 2, since the run names no endpoints while it writes its last files."""
    top._live(ending, top._look(ending), 2.0)
    assert not (ending / "lease.json").exists()
