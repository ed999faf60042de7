"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hethub.errors import InputError

__all__ = ["whole_file", "write_json", "write_whole", "writing"]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file's path beside `path`, to be written inside; at the end it takes that name, after an error it is
    removed. A device, a pipe and whatever else is no regular file is not replaced: it is written itself.

    Raises OSError where the file cannot be written.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    # Two processes may write one file at once, so each has a temporary file of its own.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it is gone when all went well, and was never made in a folder that is none
            temporary.unlink()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; text in UTF-8. Raises OSError where it cannot be written."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file whole or not at all. Raises ValueError for a number that JSON lacks, and OSError."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Around what writes `path`: where that cannot be, an InputError says so, and gives the `advice`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}). {advice}") from error
