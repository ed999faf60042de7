"""HTML and SVG in which text is text: whatever is not made here is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Html", "element", "joined", "number", "table"]

_VOID = frozenset(("meta", "rect", "line", "path", "circle", "br"))  # without children they need no end


class Html(str):
    """Markup that is safe as it stands; only `element` and `joined` make it."""

    __slots__ = ()


Child = str | None


def element(name: str, /, *children: Child | Iterable[Child], **attributes: str | float | None) -> Html:
    """An element. Children that are no `Html` are text and escaped, None is left out; so are attributes, whose names
    have hyphens for underscores (`class_` for class), and floats in them two decimals."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(_value(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = joined(*children)
    if name in _VOID and not inside:
        return Html(f"<{name}{written}>" if name in ("meta", "br") else f"<{name}{written}/>")
    return Html(f"<{name}{written}>{inside}</{name}>")


def joined(*children: Child | Iterable[Child]) -> Html:
    """Children one after the other, escaped unless they are `Html`."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(_escaped(child))
        elif child is not None:
            parts.append(joined(*child))
    return Html("".join(parts))


def _escaped(text: str) -> str:
    """Text as markup; what is no character of a page (in names of files it may stand) becomes a question mark."""
    plain = text.encode("utf-8", errors="replace").decode()
    return html.escape("".join(c if c >= " " or c in "\n\t" else "?" for c in plain))


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)


def number(value: float) -> str:
    """Two decimals, without zeros at their end."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(headings: Iterable[str], rows: Iterable[Iterable[Child]]) -> Html:
    """A table; cells that look like numbers stand to the right by the page's style."""
    head = element("tr", [element("th", heading) for heading in headings])
    body = [element("tr", [element("td", cell) for cell in row]) for row in rows]
    return element("table", element("thead", head), element("tbody", body))
