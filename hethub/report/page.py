"""The report's page: one HTML file without scripts, which asks nothing of the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hethub import __version__
from hethub.files import write_whole
from hethub.report.data import RunData
from hethub.report.markup import Html, element, joined
from hethub.report.sections import SECTIONS

__all__ = ["report_page", "write_report"]

# No script, nothing loaded: what a name or a reason holds can at worst look odd.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

_STYLE = Html("""
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1060px; margin: 0 auto; padding: 0 16px 60px; }
h1 { font-size: 26px; margin: 28px 0 4px; } h2 { font-size: 19px; margin: 34px 0 8px; border-top: 1px solid #d0d7de;
padding-top: 14px; } h3 { font-size: 15px; margin: 16px 0 4px; overflow-wrap: anywhere; }
p { margin: 4px 0; overflow-wrap: anywhere; } p.how, td.how { color: #57606a; } h1 { overflow-wrap: anywhere; }
p.mark { background: #fff4d6; padding: 4px 10px; border-radius: 4px; display: inline-block; }
table { border-collapse: collapse; margin: 8px 0; } td, th { padding: 3px 14px 3px 0; text-align: left;
vertical-align: top; overflow-wrap: anywhere; border-bottom: 1px solid #eaeef2; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; display: block; margin: 6px 0; } p.legend { color: #57606a; font-size: 13px; }
p.legend span { margin-right: 16px; white-space: nowrap; } p.legend svg { width: 12px; display: inline; margin: 0; }
text { font: 11.5px system-ui, sans-serif; fill: #3b434b; } text.strong { font-weight: 600; fill: #1b1f24; }
text.small { font-size: 10px; } text.inside { fill: #fff; font-weight: 600; pointer-events: none; }
line.grid { stroke: #e3e7eb; } line.limit { stroke: #b00020; stroke-dasharray: 3 2; } rect.frame { stroke: #d0d7de; }
rect.box { stroke: #fff; } nav a { margin-right: 14px; }
@media print { h2 { break-after: avoid; } svg { break-inside: avoid; } }
""")


def report_page(runs: Sequence[RunData]) -> Html:
    """The page of one run, or of several side by side."""
    title = " against ".join(run.name for run in runs)
    parts: list[Html] = []
    entries: list[Html] = []
    for name, (heading, how, make) in SECTIONS.items():
        content = make(runs)
        if content is not None:
            entries.append(element("a", heading, href=f"#{name}"))
            parts.append(
                element("section", element("h2", heading, id=name), element("p", how, class_="how"), content)
            )
    emulated = [run.name for run in runs if run.emulated]
    mark = element(
        "p",
        "emulated: "
        + ", ".join(emulated)
        + ". Devices and links are modelled; times, speeds, energy and money are "
        "modelled too.",
        class_="mark",
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title} - HetHub report"),
        element("style", _STYLE),
    )
    body = element(
        "body",
        element("h1", title),
        mark if emulated else None,
        element("nav", entries),
        parts,
        element("p", f"Written by HetHub {__version__}.", class_="how"),
    )
    return joined(Html("<!DOCTYPE html>\n"), element("html", head, body, lang="en"), "\n")


def write_report(path: Path, runs: Sequence[RunData]) -> None:
    """Write the page, whole or not at all. Raises OSError when it cannot be written."""
    write_whole(path, report_page(runs))
