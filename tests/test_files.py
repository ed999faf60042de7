"""Files are whole or not there, and what is no regular file is written to, not replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hethub.errors import InputError
from hethub.files import whole_file, write_whole, writing


def test_a_file_is_as_it_was_until_all_is_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_whole(file, "before")
    with pytest.raises(ValueError, match="half"), whole_file(file) as temporary:
        temporary.write_text("half")
        assert file.read_text() == "before"
        raise ValueError("half")
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    write_whole(file, b"after")
    assert file.read_text() == "after" and list(tmp_path.iterdir()) == [file]


def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path: Path) -> None:
    """As root `--output /dev/null` once made a regular file of the machine's null device."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "through")
    assert os.read(reader, 100) == b"through" and pipe.is_fifo()
    os.close(reader)


def test_a_folder_that_is_not_there_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_whole(tmp_path / "none" / "file", "content")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_an_input_error_with_the_advice(tmp_path: Path) -> None:
    path = tmp_path / "no folder" / "file"
    with pytest.raises(InputError) as raised, writing(path, "Give another."):
        write_whole(path, "text")
    assert raised.value.message == f"{path}: cannot be written (No such file or directory). Give another."
