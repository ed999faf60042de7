"""Small SVG charts: lines, stacked and paired bars, a heat map. Hovering shows a mark's words (`title`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hethub.report.markup import Html, element

__all__ = ["PALETTE", "WIDTH", "Bar", "bars", "heat_map", "legend", "lines", "nice_ticks", "stacked", "svg"]

# Okabe and Ito's colour-blind-safe palette.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#332288", "#999999")
WIDTH = 1000.0
_ROW, _LEFT, _CHARACTER = 22.0, 190.0, 6.6


def svg(height: float, marks: Sequence[Html], label: str) -> Html:
    """A drawing of the page's width; `label` is what it shows, for those who do not see it."""
    return element(
        "svg",
        marks,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label=label,
    )


def text(x: float, y: float, words: str, anchor: str = "start", class_: str | None = None) -> Html:
    """Words at a place."""
    return element("text", words, x=x, y=y, text_anchor=anchor, class_=class_)


def clipped(words: str, pixels: float) -> str:
    """Words cut to a width."""
    most = max(3, int(pixels / _CHARACTER))
    return words if len(words) <= most else words[: most - 1] + "…"


def legend(colours: Mapping[str, str]) -> Html:
    """Names beside their colours."""
    entries = [
        element(
            "span",
            element(
                "svg",
                element("rect", width=12, height=12, fill=colour),
                width=12,
                height=12,
                viewBox="0 0 12 12",
            ),
            f" {name}",
        )
        for name, colour in colours.items()
    ]
    return element("p", entries, class_="legend")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them; one where they are equal."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * n for n in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values from `low` to `high` onto pixels from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def at(self, value: float) -> float:
        """The place of a value."""
        span = self.high - self.low
        return self.start + (self.stop - self.start) * ((value - self.low) / span if span > 0 else 0.5)


def lines(series: Sequence[tuple[str, Sequence[float], Sequence[float]]], x_label: str, y_label: str) -> Html:
    """Curves of (name, x, y); points that are no finite numbers are left out."""
    curves = [
        (name, [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)])
        for name, xs, ys in series
    ]
    curves = [(name, points) for name, points in curves if points]
    if not curves:
        return element("p", "nothing was measured")
    every = [point for _, points in curves for point in points]
    height = 300.0
    across = Axis(min(x for x, _ in every), max(x for x, _ in every), 60.0, WIDTH - 20.0)
    upward = Axis(min(y for _, y in every), max(y for _, y in every), height - 46.0, 14.0)
    marks = []
    for tick in nice_ticks(upward.low, upward.high):
        y = upward.at(tick)
        marks += [
            element("line", x1=across.start, x2=across.stop, y1=y, y2=y, class_="grid"),
            text(across.start - 6, y + 4, f"{tick:g}", "end"),
        ]
    for tick in nice_ticks(across.low, across.high, 10):
        marks.append(text(across.at(tick), height - 28, f"{tick:g}", "middle"))
    marks += [
        text((across.start + across.stop) / 2, height - 8, x_label, "middle"),
        text(across.start, 10, y_label),
    ]
    colours = {}
    for (name, points), colour in zip(curves, _cycle(len(curves)), strict=True):
        colours[name] = colour
        d = "M" + " L".join(f"{across.at(x):.1f} {upward.at(y):.1f}" for x, y in _thinned(points))
        drawn = element("path", d=d, fill="none", stroke=colour, stroke_width=1.6)
        dots = (
            [element("circle", cx=across.at(x), cy=upward.at(y), r=3, fill=colour) for x, y in points]
            if len(points) <= 12
            else []
        )
        marks += [element("g", element("title", name), drawn, dots)]
    return element("div", legend(colours), svg(height, marks, label=f"{y_label} by {x_label}"))


def _thinned(points: Sequence[tuple[float, float]], most: int = 2000) -> Sequence[tuple[float, float]]:
    """No more points than a screen shows."""
    stride = -(-len(points) // most)
    return points if stride == 1 else [*points[::stride], points[-1]]


def _cycle(count: int) -> list[str]:
    return [PALETTE[n % len(PALETTE)] for n in range(count)]


def stacked(rows: Sequence[tuple[str, Mapping[str, float]]], colours: Mapping[str, str], label: str) -> Html:
    """A bar a row, cut into shares that add up to at most 1, in the order of `colours`."""
    marks = []
    scale = WIDTH - _LEFT - 20.0
    for place, (name, shares) in enumerate(rows):
        y = place * _ROW + 4.0
        marks.append(_row_name(name, y))
        x = _LEFT
        for cause, colour in colours.items():
            width = scale * max(0.0, min(1.0, shares.get(cause, 0.0)))
            if width >= 0.05:
                told = element("title", f"{name}: {cause} {100 * shares[cause]:.2f} %")
                marks.append(
                    element("rect", told, x=x, y=y, width=width, height=_ROW - 6, fill=colour, class_="bar")
                )
            x += width
    return element("div", legend(colours), svg(len(rows) * _ROW + 8, marks, label=label))


def _row_name(name: str, y: float) -> Html:
    return element(
        "g", element("title", name), text(_LEFT - 8, y + _ROW - 10, clipped(name, _LEFT - 12), "end")
    )


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of `bars`: named values in one unit, and the most that there can be (None: not known)."""

    name: str
    values: Mapping[str, float | None]
    limit: float | None = None


def bars(rows: Sequence[Bar], unit: str, label: str) -> Html:
    """Thin bars of each row below each other, all rows on one scale; a line stands at each row's limit."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    colours = dict(zip(names, _cycle(len(names)), strict=True))
    top = max([v for row in rows for v in (*row.values.values(), row.limit) if v is not None], default=0.0)
    scale = Axis(0.0, top or 1.0, _LEFT, WIDTH - 90.0)
    thin = 9.0
    tall = max(_ROW, thin * len(names) + 8)
    marks = []
    for place, row in enumerate(rows):
        y = place * tall + 4.0
        marks.append(_row_name(row.name, y + (tall - _ROW) / 2))
        for number, name in enumerate(names):
            value = row.values.get(name)
            if value is None:
                continue
            told = element("title", f"{row.name}: {name} {value:,.2f} {unit}")
            marks.append(
                element(
                    "rect", told, x=_LEFT, y=y + number * thin, width=max(0.5, scale.at(value) - _LEFT),
                    height=thin - 1, fill=colours[name],
                )
            )  # fmt: skip
        if row.limit is not None:
            x = scale.at(row.limit)
            told = element("title", f"{row.name}: limit {row.limit:,.2f} {unit}")
            marks.append(element("line", told, x1=x, x2=x, y1=y, y2=y + tall - 8, class_="limit"))
        words = " / ".join("?" if v is None else f"{v:,.2f}" for v in map(row.values.get, names))
        marks.append(text(WIDTH - 84, y + tall / 2, words))
    return element("div", legend(colours), svg(len(rows) * tall + 8, marks, label=label))


def heat_map(names: Sequence[str], values: Mapping[tuple[int, int], float], unit: str, label: str) -> Html:
    """A square of rows and columns of the same names; (row, column) -> value, nothing where there is none."""
    left, top = 150.0, 90.0
    cell = min(40.0, (WIDTH - left - 20.0) / max(1, len(names)))
    most = max(values.values(), default=0.0)
    marks = []
    for place, name in enumerate(names):
        middle = place * cell + cell / 2
        marks.append(text(left - 8, top + middle + 4, clipped(name, left - 12), "end"))
        turned = f"translate({left + middle + 4:.1f} {top - 8:.1f}) rotate(-45)"
        marks.append(element("text", clipped(name, top + 20), transform=turned))
    for (row, column), value in values.items():
        told = element("title", f"{names[row]} to {names[column]}: {value:,.1f} {unit}")
        marks.append(
            element(
                "rect", told, x=left + column * cell, y=top + row * cell, width=cell - 1, height=cell - 1,
                fill=PALETTE[0], fill_opacity=0.12 + 0.88 * (value / most if most else 0.0),
            )
        )  # fmt: skip
    size = cell * len(names) + 1
    marks.append(element("rect", width=size, height=size, x=left - 1, y=top - 1, fill="none", class_="frame"))
    return svg(top + size + 6, marks, label=label)
