"""How a driver lets go of its run folder, and what it leaves there of its end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hethub.data.token_file import token_file_for
from hethub.data.tokenizers import load_tokenizer
from hethub.errors import HeadLostError
from hethub.launch.driver import _end_noted
from hethub.launch.run_folder import RunFolder
from hethub.launch.run_state import read_run
from tests.launch.small_job import hethub, write_job


def test_a_failure_right_after_the_folder_is_taken_lets_go_of_it_and_stands_in_the_journal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Seen to catch: lease and lock stayed and nothing was noted, so that the run was lost. Here the tokens cannot be
    moved to their place."""
    write_job(tmp_path)
    held = RunFolder(tmp_path / "run")
    held.open({"job_file": str(tmp_path / "job.yaml")})
    held.close()
    tokens = token_file_for([tmp_path / "text.txt"], load_tokenizer("bytes"), tmp_path / "made").path.name
    (held.path / tokens / tokens).mkdir(parents=True)
    with pytest.raises(shutil.Error):
        hethub(capsys, tmp_path, "launch", "--resume", "run")
    assert not (held.path / "lease.json").exists() and not (held.path / "run.lock").exists()
    state = read_run(held.path)
    assert (state.state, state.exit_code) == ("failed", 1) and "already exists" in state.why


def test_the_journal_of_a_run_whose_ray_head_is_lost_has_the_commands_exit_code(tmp_path: Path) -> None:
    """Seen to catch: the code by which the driver tells its launcher."""
    held = RunFolder(tmp_path / "run")
    held.open({})
    held.close()
    with pytest.raises(HeadLostError), _end_noted(held.path):
        raise HeadLostError("the Ray head is gone")
    assert read_run(held.path).exit_code == 1
