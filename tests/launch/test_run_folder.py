from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys

import pytest

from hethub.checkpoints.store import CHECKPOINTS
from hethub.errors import InputError
from hethub.files import write_json
from hethub.launch.history import HISTORY
from hethub.launch.run_folder import RunFolder
from tests.launch.small_job import listing


def test_a_new_folder_is_made_with_its_parents_and_marked(tmp_path):
    folder = RunFolder(tmp_path / "runs" / "first")
    folder.open({"job": "job.yaml"})
    assert json.loads((folder.path / "run.json").read_text()) == {"job": "job.yaml"}
    assert (folder.path / "logs").is_dir()


def test_a_folder_that_is_open_refuses_another(tmp_path):
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    one.open({})
    before = listing(tmp_path)
    for refuse in (other.check, lambda: other.open({})):
        with pytest.raises(InputError, match="in use by a running job"):
            refuse()
    assert listing(tmp_path) == before


def test_a_closed_run_is_replaced_whole(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.open({"number": 1})
    (folder.path / "logs" / "a.log").write_text("old")
    (folder.path / "model.safetensors").write_text("old")
    folder.close()
    folder.open({"number": 2})
    folder.close()
    assert set(listing(folder.path)) == {"logs", "run.json"}


def test_a_lock_that_nobody_holds_is_no_hindrance(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "run.lock").touch()
    RunFolder(tmp_path).open({})


def killed_before(number, work):
    """Do `work` in a fork that kills itself right before its file operation `number`; whether it came so far."""
    operations, count = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}, itertools.count()

    def look(event, _):
        if event in operations and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            sys.addaudithook(look)  # for good: in the fork alone
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("earlier", [False, True])
def test_a_folder_is_taken_wherever_the_launch_before_was_killed_while_it_took_it(tmp_path, earlier):
    """Seen to catch: the mark removed with the rest and written last, so that what was left looked like no run's; a
    lock and a lease without a mark taken for anyone else's files."""
    killed, number = True, 0
    while killed:
        folder = RunFolder(tmp_path / str(number))
        if earlier:
            folder.open({"number": 1})
            for name in (HISTORY, CHECKPOINTS):
                (folder.path / name).mkdir()
                (folder.path / name / "file").touch()
            (folder.path / "summary.json").touch()
            folder.close()
        killed = killed_before(number, functools.partial(RunFolder(folder.path).open, {"number": 2}))
        if not (folder.path / HISTORY / "file").exists():
            assert not (folder.path / CHECKPOINTS).exists()  # resumed there, the run would lack its steps
        folder.open({"number": 3})
        folder.close()
        assert json.loads(listing(folder.path)["run.json"]) == {"number": 3}
        assert set(listing(folder.path)) == {"logs", "run.json"}
        number += 1
    assert number > 4


def test_a_launch_that_was_killed_before_it_made_its_logs_is_gone_on_with(tmp_path):
    write_json(tmp_path / "run.json", {})
    folder = RunFolder(tmp_path)
    folder.reopen()
    folder.close()
    assert set(listing(tmp_path)) == {"logs", "run.json"}


def test_one_that_was_refused_does_not_take_the_others_lock_away(tmp_path):
    """Seen to catch: closing it removed the lock file of the one that holds the folder."""
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    one.open({})
    with pytest.raises(InputError):
        other._take()  # which comes after the look that refuses, of two that look at once
    other.close()
    assert (tmp_path / "run" / "run.lock").exists()
    one.close()


def test_files_that_no_run_wrote_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds files that no run wrote"):
        RunFolder(tmp_path).open({})
    assert set(listing(tmp_path)) == {"thesis.tex"}


def test_what_a_link_in_the_folder_points_to_stays(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text").write_text("kept")
    folder = RunFolder(tmp_path / "run")
    folder.open({})
    (folder.path / "data").symlink_to(tmp_path / "data")
    folder.close()
    folder.open({})
    assert (tmp_path / "data" / "text").read_text() == "kept"
    assert not (folder.path / "data").exists()


def test_an_empty_folder_is_taken(tmp_path):
    RunFolder(tmp_path).open({})
    assert (tmp_path / "run.json").exists()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_a_place_where_no_folder_can_be_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("text")
    with pytest.raises(InputError, match="output "):
        RunFolder(tmp_path / name).open({})
    assert set(listing(tmp_path)) == {"file"}


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"loss": 1.5})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert listing(tmp_path) == {"a.json": b'{\n  "loss": 1.5\n}\n'}
