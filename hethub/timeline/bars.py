"""A page with one bar for each of several planners."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hethub.timeline.plots import graph_objects, write_page

__all__ = ["write_bars"]


def write_bars(path: Path, title: str, bars: Sequence[tuple[str, float]]) -> None:
    """Write the page for (name, tokens per second) bars; a bar of 0 is one that found no plan.

    Raises MachineError without the package plotly, InputError where `path` cannot be written.
    """
    go = graph_objects()
    best = max(speed for _, speed in bars)
    figure = go.Figure(
        go.Bar(
            x=[name for name, _ in bars],
            y=[speed for _, speed in bars],
            text=[f"{speed / best:.0%}" if speed else "no plan" for _, speed in bars],
        )
    )
    figure.update_layout(title=title)
    figure.update_yaxes(title="predicted tokens per second")
    write_page(path, figure)
