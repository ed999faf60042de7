"""Text of others on a terminal."""

from __future__ import annotations

__all__ = ["shown"]


def shown(text: str) -> str:
    """A line with what steers a terminal, or is no character at all, written out; tabs stay. Names of folders, reasons
    of workers and labels of metrics are others' text."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
