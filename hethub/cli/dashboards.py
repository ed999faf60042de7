"""`hethub dashboards`: Grafana's boards and Prometheus' rules as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["dashboards"]


def dashboards(
    output: Annotated[Path, typer.Option(help="Folder for the boards, one JSON file each.")],
    rules: Annotated[
        Path | None, typer.Option(help="Folder for the recording and alert rules, two YAML files.")
    ] = None,
    runbook: Annotated[
        str | None, typer.Option(help="Address of docs/dashboards.md, to which alerts point.")
    ] = None,
) -> None:
    """Write the boards for Grafana and, if asked, the rules for Prometheus; the same bytes each time.

    docker/ holds them already, with a compose file that starts both. Needs hethub[dashboards].

    Example: hethub dashboards --output docker/grafana/boards --rules docker/prometheus/rules
    """
    from hethub.telemetry.alerts import RUNBOOK
    from hethub.telemetry.boards import BOARDS, board_json
    from hethub.telemetry.rule_files import alert_file, recording_file
    from hethub.telemetry.rules import Durations

    files = {output / f"{board.uid}.json": board_json(board) for board in BOARDS}
    if rules is not None:
        files[rules / "recording.yaml"] = recording_file(Durations())
        files[rules / "alerts.yaml"] = alert_file(Durations(), runbook or RUNBOOK)
    for path, text in files.items():
        _write(path, text)
        typer.echo(f"wrote {path}", err=not sys.stdout.isatty())


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises InputError where it cannot be written."""
    from hethub.files import write_whole, writing

    with writing(path, "Give another folder."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
