"""Text stays text, whatever it holds."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from hethub.report.charts import Bar, bars, heat_map, lines, nice_ticks, stacked
from hethub.report.markup import element, joined, table

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&lt;\x00\udcff"


class Parsed(HTMLParser):
    """Names of all elements, and all text."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@given(st.text())
def test_any_text_comes_back_as_text_and_makes_no_element(text: str) -> None:
    """Seen to catch: a child that is not escaped; an attribute escaped without its quotes."""
    found = Parsed(element("p", text, title=text))
    assert found.names == ["p"] and [key for key, _ in found.attributes] == ["title"]
    shown = "".join(c if c >= " " or c in "\n\t" else "?" for c in text)
    assert found.text.replace("\r", "?") == shown and found.attributes[0][1] == shown


def test_charts_keep_hostile_names_as_text() -> None:
    charts = [
        lines([(HOSTILE, [0, 1, 2], [3.0, float("nan"), 1.0])], HOSTILE, HOSTILE),
        stacked([(HOSTILE, {"busy": 0.5})], {"busy": "#000"}, HOSTILE),
        bars([Bar(HOSTILE, {"predicted": 1.0, "measured": None}, 2.0)], HOSTILE, HOSTILE),
        heat_map([HOSTILE], {(0, 0): 1.0}, HOSTILE, HOSTILE),
        table([HOSTILE], [[HOSTILE]]),
    ]
    found = Parsed(joined(charts))
    assert not {"script", "img"} & set(found.names)
    assert not any(key.startswith("on") or key in ("src", "href") for key, _ in found.attributes)


@given(
    st.floats(-1e9, 1e9, allow_nan=False).flatmap(
        lambda low: st.tuples(st.just(low), st.floats(1e-6, 1e6).map(lambda more: low + more))
    )
)
def test_ticks_lie_inside_and_are_few(ends: tuple[float, float]) -> None:
    low, high = ends
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1.0)
    assert len(ticks) <= 12 and all(low - slack <= tick <= high + slack for tick in ticks)
