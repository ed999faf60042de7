"""The Gantt chart of one step as one HTML file that needs nothing else: no network, no other file.

The predicted step stands above the measured one on one time axis; every device is a lane. The file allows
only its own two scripts (Content-Security-Policy with a nonce), and every name that people chose is escaped.
"""

from __future__ import annotations

import hashlib
import html
from pathlib import Path
from typing import Any

from hethub.files import write_whole
from hethub.timeline.panels import (
    COLOURS,
    Bars,
    Panel,
    bars_of,
    first_compute,
    hover_lines,
    panel_of,
    parameter_sends,
)
from hethub.timeline.plots import graph_objects
from hethub.timeline.record import Timeline

__all__ = ["gantt_figure", "write_gantt"]

Figure = dict[str, Any]

_MARKS = "parameters sent"  # a send takes no time that one could see
_LANE_PIXELS = 26
_PANEL_GAP_PIXELS = 52
_MARGIN_PIXELS = {"t": 92, "b": 118, "l": 20, "r": 24}


def write_gantt(path: Path, predicted: Timeline, measured: Timeline | None, step: int, title: str) -> None:
    """Write the chart of measured `step` under the predicted one, whole or not at all.

    Raises InputError when the step is not in the timeline, MachineError without the package plotly, and
    OSError when the file cannot be written.
    """
    go = graph_objects()
    from plotly.offline import get_plotlyjs

    figure = go.Figure(gantt_figure(predicted, measured, step, title)).to_json()
    page = _page(title, figure.replace("<", "\\u003c"), get_plotlyjs())
    write_whole(path, page)


def gantt_figure(predicted: Timeline, measured: Timeline | None, step: int, title: str) -> Figure:
    """Return the chart as a Plotly figure (`data` and `layout`). Raises InputError as `write_gantt` does."""
    panels = [panel_of(predicted, 0, "predicted step")]
    if measured is not None:
        panels.append(panel_of(measured, step, f"measured step {step}"))
    traces: list[Figure] = []
    seen: set[str] = set()
    span = max(panel.seconds for panel in panels)
    for number, panel in enumerate(panels, start=1):
        bars = bars_of(panel)
        for name in COLOURS:
            if name in bars:
                traces.append(_trace(name, bars[name], number, name not in seen, span))
                seen.add(name)
        if sends := parameter_sends(panel):
            traces.append(_marks(sends, number, _MARKS not in seen))
            seen.add(_MARKS)
    emulated = predicted.info.emulated or (measured is not None and measured.info.emulated)
    return {"data": traces, "layout": _layout(panels, title, emulated, span)}


def _hover(lines: list[str]) -> str:
    first, *rest = map(_escape, lines)
    return "<br>".join([f"<b>{first}</b>", *rest])


def _escape(text: str) -> str:
    """Make text plain for Plotly, which reads tags and the entities &amp; &lt; &gt; in every label."""
    return html.escape(text, quote=False)


# --- how it is drawn --------------------------------------------------------------------------------------


def _trace(name: str, bars: Bars, panel: int, in_legend: bool, span: float) -> Figure:
    thin = name == "collective"  # a strip along the foot of its compute action
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "legendgroup": name,
        "showlegend": in_legend,
        "xaxis": "x",
        "yaxis": "y" if panel == 1 else f"y{panel}",
        "y": bars.lanes,
        "base": bars.starts,
        "x": bars.lengths,
        "width": 0.2 if thin else 0.82,
        "offset": 0.21 if thin else -0.41,
        "marker": {
            "color": COLOURS[name],
            # A border would hide a bar that is not much wider than itself.
            "line": {"color": "white", "width": [0.6 if x > span / 300 else 0.0 for x in bars.lengths]},
        },
        "text": bars.texts,
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "hoverinfo": "text",
        "hovertext": [_hover(lines) for lines in bars.hovers],
    }


def _marks(sends: list[dict[str, Any]], panel: int, in_legend: bool) -> Figure:
    """Small triangles at the head of the sender's lane."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": _MARKS,
        "legendgroup": _MARKS,
        "showlegend": in_legend,
        "xaxis": "x",
        "yaxis": "y" if panel == 1 else f"y{panel}",
        "x": [row["start"] for row in sends],
        "y": [row["device_lane"] - 0.36 for row in sends],
        "marker": {"symbol": "triangle-down", "size": 6, "color": COLOURS["send"]},
        "hoverinfo": "text",
        "hovertext": [_hover(hover_lines(row, "send")) for row in sends],
    }


def _layout(panels: list[Panel], title: str, emulated: bool, span: float) -> Figure:
    lanes = sum(len(panel.lanes) for panel in panels)
    drawn = lanes * _LANE_PIXELS + (len(panels) - 1) * _PANEL_GAP_PIXELS
    layout: Figure = {
        "title": {"text": _escape(title) + (" (emulated: modelled time)" if emulated else ""), "x": 0.01},
        "template": "plotly_white",
        "barmode": "overlay",
        "bargap": 0,
        "height": drawn + _MARGIN_PIXELS["t"] + _MARGIN_PIXELS["b"],
        "margin": _MARGIN_PIXELS,
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {"align": "left"},
        "uniformtext": {"minsize": 8, "mode": "hide"},
        "legend": {"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom", "x": 0.0},
        "xaxis": {
            "title": {"text": "time since the step began", "standoff": 8},
            "anchor": "y" if len(panels) == 1 else f"y{len(panels)}",
            "range": [min(0.0, first_compute(panels)) - 0.005 * span, 1.01 * span],
            "tickformat": "~s",
            "ticksuffix": "s",
            "zeroline": False,
        },
        "annotations": [],
        "shapes": [],
    }
    top = 1.0
    for number, panel in enumerate(panels, start=1):
        axis = "y" if number == 1 else f"y{number}"
        bottom = top - len(panel.lanes) * _LANE_PIXELS / drawn
        layout["yaxis" + axis[1:]] = _lane_axis(panel, max(bottom, 0.0), top)
        layout["annotations"].append(_heading(panel, top))
        layout["shapes"].append(_step_end(panel, axis))
        top = bottom - _PANEL_GAP_PIXELS / drawn
    return layout


def _lane_axis(panel: Panel, bottom: float, top: float) -> Figure:
    return {
        "domain": [bottom, top],
        "anchor": "x",
        "range": [len(panel.lanes) - 0.5, -0.5],  # first device on top
        "tickmode": "array",
        "tickvals": list(range(len(panel.lanes))),
        "ticktext": [_escape(lane) for lane in panel.lanes],
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
    }


def _heading(panel: Panel, top: float) -> Figure:
    position = {"xref": "paper", "x": 0.0, "xanchor": "left", "yref": "paper", "y": top, "yanchor": "bottom"}
    return {"text": f"<b>{_escape(panel.title)}</b>", "showarrow": False, **position}


def _step_end(panel: Panel, axis: str) -> Figure:
    """A dotted line where the step ends."""
    place = {
        "xref": "x",
        "x0": panel.seconds,
        "x1": panel.seconds,
        "yref": f"{axis} domain",
        "y0": 0,
        "y1": 1,
    }
    return {"type": "line", "line": {"color": "black", "width": 1, "dash": "dot"}, **place}


def _page(title: str, figure: str, library: str) -> str:
    """Return the whole page; `figure` is JSON without `<`, `library` the text of Plotly's script."""
    nonce = hashlib.sha256((title + figure).encode()).hexdigest()[:32]
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
</head>
<body>
<noscript>This chart is drawn by the script in this file: allow scripts to see it.</noscript>
<div id="chart"></div>
<script nonce="{nonce}">{library}</script>
<script nonce="{nonce}">
const figure = {figure};
Plotly.newPlot("chart", figure.data, figure.layout, {{responsive: true, displaylogo: false}});
</script>
</body>
</html>
"""
