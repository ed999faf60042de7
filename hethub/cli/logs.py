"""`hethub logs RUN`: what driver and workers wrote, as it stands or as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hethub.cli.runs import Run

__all__ = ["DRIVER_LOG", "logs"]

DRIVER_LOG = "driver.log"  # in the run's `logs`, of a detached launch
_LOOK_SECONDS = 0.2


def logs(
    run: Run,
    device: Annotated[
        str | None, typer.Option(help="This device's alone (group/node/device), or `driver`.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
) -> None:
    """Show the logs of a run's driver and workers, each line after the name of who wrote it.

    Example: hethub logs runs/demo --device fast/0/1 --follow
    """
    from hethub.launch.run_state import goes_on, read_run

    read_run(run)  # which refuses what is no run
    folder = run / "logs"
    chosen = None if device is None else _chosen(folder, device)
    readers: dict[Path, _Tail] = {}
    while True:
        ended = not (follow and goes_on(run))  # asked before reading: what comes last is shown too
        for path in [chosen] if chosen is not None else sorted(folder.glob("*.log")):
            tail = readers.setdefault(path, _Tail(path))
            name = "" if chosen is not None else f"{path.stem}: "
            for line in tail.lines(last=ended):
                typer.echo(json.dumps({"writer": path.stem, "line": line}) if as_json else f"{name}{line}")
        if ended:
            return
        time.sleep(_LOOK_SECONDS)


def _chosen(folder: Path, device: str) -> Path:
    from hethub.errors import InputError
    from hethub.specs.nearest import unknown_name

    path = folder / f"{device.replace('/', '-')}.log"
    if not path.is_file():
        known = {file.stem: None for file in sorted(folder.glob("*.log"))}
        raise InputError(f"{folder.parent}: {unknown_name(f'it has no log of {device}', path.stem, known)}")
    return path


class _Tail:
    """A file that is appended to, read line by line as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._rest = path, 0, b""

    def lines(self, *, last: bool) -> Iterator[str]:
        """The lines since the last call; with `last` one without an end counts."""
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._at)
                read = stream.read()
        except OSError:
            read = b""
        self._at += len(read)
        *whole, self._rest = (self._rest + read).split(b"\n")
        if last and self._rest:
            whole.append(self._rest)
        for line in whole:
            yield line.decode("utf-8", errors="replace")
