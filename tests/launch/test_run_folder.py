from __future__ import annotations

import json

import pytest

from hethub.errors import InputError
from hethub.files import write_json
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
