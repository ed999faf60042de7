"""Predicted over measured step times as a page with one scatter plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hethub.timeline.plots import graph_objects, write_page

__all__ = ["write_scatter"]


def write_scatter(path: Path, runs: Sequence[tuple[str, float, float]]) -> None:
    """Write the page for runs of (name, measured seconds, predicted seconds), both axes logarithmic.

    Raises MachineError without the package plotly, InputError where `path` cannot be written.
    """
    go = graph_objects()
    measured = [seconds for _, seconds, _ in runs]
    ends = [min(measured) / 1.2, max(measured) * 1.2]
    figure = go.Figure(
        [
            go.Scatter(x=ends, y=ends, mode="lines", name="equal", line={"dash": "dot"}),
            go.Scatter(
                x=measured,
                y=[seconds for _, _, seconds in runs],
                mode="markers",
                name="runs",
                text=[f"{name}: {100 * (p / m - 1):+.1f} %" for name, m, p in runs],
                hoverinfo="text",
            ),
        ]
    )
    figure.update_xaxes(title="measured step, s", type="log")
    figure.update_yaxes(title="predicted step, s", type="log")
    write_page(path, figure)
