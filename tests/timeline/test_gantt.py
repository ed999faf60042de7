from __future__ import annotations

import builtins
import re

import pytest

from hethub.errors import InputError, MachineError
from hethub.timeline.gantt import gantt_figure, write_gantt
from hethub.timeline.record import Kind

go = pytest.importorskip("plotly.graph_objects")


def bars(figure, panel, name):
    (trace,) = (
        trace
        for trace in figure["data"]
        if trace["name"] == name and trace["yaxis"] == ("y" if panel == 1 else f"y{panel}")
    )
    return list(zip(trace["y"], trace["base"], trace["x"], trace["text"], strict=True))


@pytest.fixture
def figure(timeline, rows):
    predicted = timeline(rows(0, 0.0), origin="predicted")
    return gantt_figure(predicted, timeline(rows(0, 5.0) + rows(1, 15.0), emulated=True), 1, "run")


def test_plotly_accepts_the_figure(figure):
    assert len(go.Figure(figure).data) == len(figure["data"])


def test_each_device_is_a_lane_in_the_order_listed(figure):
    for axis in ("yaxis", "yaxis2"):
        assert figure["layout"][axis]["ticktext"] == ["g/0/0 (fast)", "g/0/1 (slow)"]
    first, second = figure["layout"]["yaxis"]["domain"], figure["layout"]["yaxis2"]["domain"]
    assert (first[1], first[0] > second[1], second[0]) == (1.0, True, pytest.approx(0.0))


def test_bars_stand_where_the_actions_were_and_carry_the_micro_batch(figure):
    assert bars(figure, 1, "forward") == [(0, 0.0, 2.0, "0"), (1, 3.0, 2.0, "0")]


def test_a_measured_step_is_moved_to_start_at_zero(figure):
    for name in ("forward", "backward", "bubble", "exposed communication", "send"):
        assert bars(figure, 1, name) == bars(figure, 2, name)


def test_a_wait_splits_where_its_message_was_sent(figure):
    assert bars(figure, 1, "bubble") == [(0, 2.5, 4.5, ""), (1, 0.0, 2.0, "")]
    assert bars(figure, 1, "exposed communication") == [(0, 7.0, 1.0, ""), (1, 2.0, 1.0, "")]


def test_the_title_says_when_a_run_is_emulated(figure, timeline, rows):
    assert "emulated" in figure["layout"]["title"]["text"]
    real = gantt_figure(timeline(rows(0, 0.0)), None, 0, "run")
    assert real["layout"]["title"]["text"] == "run"
    assert "yaxis2" not in real["layout"]


def test_each_colour_stands_in_the_legend_once(figure):
    shown = [trace["name"] for trace in figure["data"] if trace["showlegend"]]
    assert sorted(shown) == sorted({trace["name"] for trace in figure["data"]})


def test_hovering_shows_the_fields_that_are_set(figure):
    (trace,) = (trace for trace in figure["data"] if trace["name"] == "send" and trace["yaxis"] == "y2")
    hover = trace["hovertext"][0]
    for part in ("send", "g/0/0 (fast)", "step 1", "message 0", "to g/0/1, 64 bytes", "500.000 ms"):
        assert part in hover


def test_parts_of_one_micro_batch_are_told_apart_by_hovering(timeline):
    def forward(action, start, micro_batch):
        place = {"step": 0, "device": 0, "stage": 0, "micro_batch": micro_batch, "action": action}
        return place | {"kind": Kind.FORWARD, "start": start, "end": start + 1.0}

    figure = gantt_figure(
        timeline([forward(0, 0.0, 0), forward(1, 1.0, 0), forward(2, 2.0, 1)]), None, 0, "run"
    )
    (trace,) = (trace for trace in figure["data"] if trace["name"] == "forward")
    one, other, whole = trace["hovertext"]
    assert "part 1 of 2" in one
    assert "part 2 of 2" in other
    assert "part" not in whole


def test_whole_and_split_backwards_have_colours_of_their_own(timeline):
    kinds = (Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
    rows = [
        {"step": 0, "device": 0, "micro_batch": 0, "kind": kind, "start": float(at), "end": at + 1.0}
        for at, kind in enumerate(kinds)
    ]
    figure = gantt_figure(timeline(rows), None, 0, "run")
    assert len({trace["marker"]["color"] for trace in figure["data"]}) == len(kinds)


def test_sends_of_parameters_are_marks_on_their_senders_lane(timeline, rows):
    send = {"step": 0, "device": 1, "kind": Kind.SEND, "lane": 1, "peer": 0, "message": 2, "bytes": 8}
    figure = gantt_figure(timeline([*rows(0, 0.0), send | {"start": 7.0, "end": 7.0}]), None, 0, "run")
    (trace,) = (trace for trace in figure["data"] if trace["name"] == "parameters sent")
    assert trace["x"] == [7.0]
    assert round(trace["y"][0]) == 1
    assert "to g/0/0, 8 bytes" in trace["hovertext"][0]
    go.Figure(figure)


def test_a_large_cluster_shows_evenly_chosen_devices_and_says_so(timeline):
    rows = [
        {"step": 0, "device": device, "kind": 0, "start": float(at), "end": at + 1.0}
        for device in range(400)
        for at in range(100)
    ]
    figure = gantt_figure(timeline(rows, devices=400), None, 0, "run")
    assert len(figure["layout"]["yaxis"]["ticktext"]) == 200
    assert "200 of 400 devices" in figure["layout"]["annotations"][0]["text"]


def test_the_page_stands_alone_and_escapes_every_name(tmp_path, timeline, rows):
    evil = "</script><script>alert(1)</script>"
    line = timeline(rows(0, 0.0), devices=(2), device_types=(evil, "<a href='x'>t</a>"))
    write_gantt(tmp_path / "chart.html", line, line, 0, evil)
    assert [path.name for path in tmp_path.iterdir()] == ["chart.html"]
    page = (tmp_path / "chart.html").read_text()
    assert "alert(1)</script>" not in page
    assert "<a href='x'>" not in page
    assert re.search(r"<(script|link|img|iframe)[^>]*(src|href)=", page.split("</head>")[0]) is None
    scripts = re.findall(r"^<script.*?>", page, flags=re.MULTILINE)
    nonce = re.search(r"script-src 'nonce-(\w+)'", page)
    assert scripts == [f'<script nonce="{nonce[1]}">'] * 2


def test_an_absent_step_is_refused(timeline, rows):
    line = timeline(rows(0, 0.0))
    with pytest.raises(InputError, match="step 7: not in the timeline"):
        gantt_figure(line, line, 7, "run")


def test_without_plotly_the_error_names_the_extra(tmp_path, timeline, rows, monkeypatch):
    load = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("plotly"):
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MachineError, match="plots"):
        write_gantt(tmp_path / "chart.html", timeline(rows(0, 0.0)), None, 0, "run")
    assert not list(tmp_path.iterdir())
