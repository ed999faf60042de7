"""The telemetry folder of a run: who serves what, and where Prometheus finds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hethub.files import write_json

__all__ = [
    "AGENTS",
    "COUNTERS",
    "MOMENTS",
    "NODES",
    "TARGETS",
    "TELEMETRY",
    "address",
    "agent_addresses",
    "agent_complaints",
    "agent_file",
    "node_file",
    "start_agent",
    "write_targets",
]

TELEMETRY = "telemetry"  # folder of the run folder
NODES = "nodes"  # its folders: a file a node, ...
COUNTERS = "counters"  # ... a device, ...
AGENTS = "agents"  # ... an agent
MOMENTS = "moments.bin"  # where senders say when
TARGETS = "targets.json"  # for Prometheus' file_sd_configs


def node_file(folder: Path, node: str) -> Path:
    """What a node's agent is told."""
    return folder / NODES / f"{node.replace('/', '-')}.json"


def agent_file(folder: Path, name: str) -> Path:
    """Where an agent says that it listens."""
    return folder / AGENTS / f"{name.replace('/', '-')}.json"


def start_agent(folder: Path, nodes: Sequence[str], name: str, listen: str) -> subprocess.Popen[bytes]:
    """Start an agent on this machine that serves `nodes` and ends with this process, its parent."""
    log = agent_file(folder, name).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "hethub.telemetry.agent"),
                *("--folder", str(folder), "--nodes", ",".join(nodes), "--name", name),
                *("--listen", listen, "--parent", str(os.getpid())),
            ],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # the terminal's Ctrl-C is the driver's
        )


def address(listen: str, port: int) -> str:
    """host:port that others reach; this machine's name where it listens everywhere."""
    host = socket.gethostname() if listen in ("0.0.0.0", "::") else listen
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def agent_addresses(folder: Path) -> dict[str, str]:
    """Where the agents of a telemetry folder listen, by name."""
    found: dict[str, str] = {}
    for file in sorted((folder / AGENTS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # it is just ending
            told: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            found[file.stem] = told["address"]
    return found


def agent_complaints(folder: Path) -> dict[str, str]:
    """What agents of a telemetry folder had to say, by name: the last line of each that said something."""
    found: dict[str, str] = {}
    for file in sorted((folder / AGENTS).glob("*.log")):
        with contextlib.suppress(OSError):
            lines = file.read_text(encoding="utf-8", errors="replace").strip().split("\n")
            if lines[-1]:
                found[file.stem] = lines[-1]
    return found


def write_targets(file: Path, run: str, addresses: Mapping[str, str]) -> None:
    """Write Prometheus' list of targets: an entry each, whose `instance` is RUN/NAME rather than a passing port.

    Raises OSError where it cannot be written.
    """
    entries = [
        {"targets": [where], "labels": {"instance": f"{run}/{name}"}} for name, where in addresses.items()
    ]
    try:
        _write_in_folder(file, entries)
    except (FileNotFoundError, FileExistsError):
        # another run has just ended, and removed the folder that both use
        _write_in_folder(file, entries)


def _write_in_folder(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    write_json(file, content)
