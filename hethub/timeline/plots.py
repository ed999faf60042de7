"""What pages with a plot share: the package that draws, and a page that is written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hethub.errors import not_installed
from hethub.files import write_whole, writing

__all__ = ["graph_objects", "write_page"]


def graph_objects() -> Any:
    """Plotly's module of that name. Raises MachineError without the package."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise not_installed("plotly", "the plot", "plots") from None
    return go


def write_page(path: Path, figure: Any) -> None:
    """Write a figure as one page that needs nothing else. Raises InputError where `path` cannot be written."""
    with writing(path, "Give another --html."):
        write_whole(path, figure.to_html(include_plotlyjs=True))
