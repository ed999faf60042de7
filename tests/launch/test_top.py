"""`hethub top` against a real run: as text, as JSON, and in a terminal that changes its size."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.small_job import edit, write_job
from tests.launch.test_operating import Operator

_WAIT_SECONDS = 60.0
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, folder: Path, columns: int, lines: int, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        self.resize(columns, lines)
        # pytest-xdist tells its processes a width by COLUMNS, which would win over the terminal's.
        kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hethub", *arguments],
            cwd=folder,
            env={**kept, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def frame(self, words: str) -> list[str]:
        """Lines of the next frame that holds `words`; what was shown before is forgotten."""
        self.shown = ""
        end = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < end:
            ready, _, _ = select.select([self.ours], [], [], 1.0)
            if ready:
                self.shown += os.read(self.ours, 1 << 16).decode(errors="replace")
            # A frame begins at the top left corner, and is whole when the next one begins.
            for frame in self.shown.split("\x1b[H")[1:-1]:
                plain = _ESCAPES.sub("", frame)
                if words in plain:
                    return plain.replace("\r", "").split("\n")
        raise AssertionError(f"no frame with {words!r}: {self.shown[-2000:]!r}")

    def close(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(timeout=_WAIT_SECONDS)
        os.close(self.ours)
        return code


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """A run that goes on."""
    folder = tmp_path_factory.mktemp("top")
    write_job(folder)
    edit(folder / "job.yaml", ("steps: 3", "steps: 5000"), ("evaluate: {every: 3, rows: 16}\n", ""))
    found = Operator(folder)
    begun = found.do("launch", "job.yaml", "--detach")
    assert begun.exit_code == 0, begun.err
    found.until("steps_done", 5)
    yield found
    found.close()


def test_without_a_terminal_it_looks_once(operator: Operator) -> None:
    text = operator.do("top", "run")
    assert text.exit_code == 0, text.err
    lines = text.out.splitlines()
    header = next(line for line in lines if line.startswith("device\t")).split("\t")
    rows = [dict(zip(header, line.split("\t"), strict=True)) for line in lines[-2:]]
    assert {row["device_type"] for row in rows} == {"fast", "slow"}
    for row in rows:
        assert sum(float(row[part]) for part in header[3:-1]) == pytest.approx(1.0, abs=0.01)
    assert any(line.startswith("# tokens/s\t") and "emulated" in line for line in lines)


def test_as_json_it_has_the_runs_figures(operator: Operator) -> None:
    done = operator.do("top", "run", "--json")
    assert done.exit_code == 0, done.err
    view = json.loads(done.out)
    assert view["emulated"] is True and view["steps"] == 5000 and view["step"] > 0
    assert 0 < view["share_of_physical_bound"] <= 1 and 0.2 < view["share_of_prediction"] < 1.1
    assert [device["name"] for device in view["devices"]] == ["a/0/0", "b/0/0"]


def test_in_a_terminal_it_fits_and_follows_its_size(operator: Operator) -> None:
    terminal = Terminal(operator.folder, 110, 30, "top", "run", "--every", "1.5")
    try:
        row = ""
        while " %" not in row:  # what a device did is known from the second look on
            wide = terminal.frame("a/0/0")
            assert all(len(line) <= 110 for line in wide) and len(wide) <= 30
            row = next(line for line in wide if line.startswith("a/0/0"))
        assert "\u2588" in row and re.search(r"\d+\.\d %", row) and "mem" in row
        terminal.resize(60, 14)
        os.killpg(terminal.process.pid, signal.SIGWINCH)
        terminal.frame("a/0/0")  # may still have the old size
        narrow = terminal.frame("a/0/0")
        assert all(len(line) <= 60 for line in narrow) and len(narrow) <= 14
        assert "mem" not in next(line for line in narrow if line.startswith("a/0/0"))
    finally:
        assert terminal.close() == 0
