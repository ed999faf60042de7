"""The two pictures of a plan: its split over devices, and the Gantt chart of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hethub.report.charts import PALETTE, WIDTH, Axis, clipped, legend, nice_ticks, svg, text
from hethub.report.markup import Html, element
from hethub.specs.plan import Pipeline, Plan, Rank, Replica
from hethub.timeline.panels import COLOURS, Bars, Panel, bars_of, first_compute

__all__ = ["gantt", "split"]

_LEFT = 150.0
_LANE, _GAP = 20.0, 44.0
_REPLICA = 26.0


def split(plan: Plan) -> Html:
    """Every pipeline of the plan over the layers of the model: a box a replica, as high as its share of the rows."""
    layers = plan.workload.model.layers + 2
    across = Axis(0.0, float(layers), _LEFT, WIDTH - 10.0)
    types = list(plan.cluster.device_types)
    colours = {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(types)}
    of_group = {group.name: group.device_type for group in plan.cluster.node_groups}
    marks: list[Html] = []
    y = 8.0
    for number, pipeline in enumerate(plan.pipelines):
        high = _REPLICA * max(len(stage.replicas) for stage in pipeline.stages)
        marks += _pipeline_name(number, pipeline, y + high / 2)
        for stage in pipeline.stages:
            x, end = across.at(stage.layers[0]), across.at(stage.layers[1])
            top = y
            for replica in stage.replicas:
                tall = high * replica.rows * replica.repeat / pipeline.micro_batch_rows
                kinds = [of_group.get(_group(rank), "") for rank in replica.ranks]
                words = _replica_words(replica, kinds, pipeline, stage.layers, stage.recompute)
                marks.append(
                    element(
                        "g",
                        element("title", "\n".join(words)),
                        element(
                            "rect", x=x + 1, y=top, width=max(1.0, end - x - 2), height=tall - 1,
                            fill=colours.get(kinds[0], PALETTE[-1]), class_="box",
                        ),
                        text((x + end) / 2, top + tall / 2 + 4, clipped(words[0], end - x - 4), "middle", "inside"),
                    )
                )  # fmt: skip
                top += tall
        y += high + 14.0
    for tick in nice_ticks(0, layers, 12):
        marks.append(text(across.at(tick), y + 6, f"{tick:g}", "middle"))
    marks.append(text(WIDTH / 2, y + 24, "layer: 0 embedding, then decoders, last the head", "middle"))
    used = {name: colours[name] for name in types}
    return element(
        "div", legend(used), svg(y + 32, marks, label="the split: which devices hold which layers")
    )


def _group(rank: Rank) -> str:
    return (rank.device or rank.devices or "").partition("/")[0].strip()


def _pipeline_name(number: int, pipeline: Pipeline, y: float) -> list[Html]:
    times = f" × {pipeline.repeat}" if pipeline.repeat > 1 else ""
    below = f"{pipeline.micro_batches} × {pipeline.micro_batch_rows} rows, {pipeline.schedule}"
    return [
        text(_LEFT - 8, y - 2, f"pipeline {number}{times}", "end"),
        text(_LEFT - 8, y + 12, clipped(below, _LEFT - 10), "end", "small"),
    ]


def _replica_words(
    replica: Replica, kinds: Sequence[str], pipeline: Pipeline, layers: tuple[int, int], recompute: str
) -> list[str]:
    degree = sum(rank.count for rank in replica.ranks)
    times = f"{replica.repeat} × " if replica.repeat > 1 else ""
    wide = f" tp {degree}" if degree > 1 else ""
    lines = [
        f"{times}{'+'.join(dict.fromkeys(kinds))}{wide}, {replica.rows} of {pipeline.micro_batch_rows} rows",
        f"layers {layers[0]} to {layers[1] - 1}, recompute {recompute}",
    ]
    lines += [
        f"{rank.device or rank.devices}: {rank.heads} heads, {rank.ffn} feed-forward columns, "
        f"{rank.vocab} vocabulary rows"
        for rank in replica.ranks
    ]
    return lines


def gantt(panels: Sequence[Panel]) -> Html:
    """Panels above each other on one time axis, a lane a device. What each bar is stands in its words."""
    span = max(panel.seconds for panel in panels)
    across = Axis(min(0.0, first_compute(list(panels))), span, 190.0, WIDTH - 10.0)
    marks: list[Html] = []
    used: dict[str, str] = {}
    y = 24.0
    for panel in panels:
        marks.append(text(0, y - 8, panel.title, class_="strong"))
        for lane, name in enumerate(panel.lanes):
            words = text(184, y + lane * _LANE + 13, clipped(name, 180), "end")
            marks.append(element("g", element("title", name), words))
        found = bars_of(panel)
        for name in COLOURS:
            if name in found:
                used[name] = COLOURS[name]
        marks += _bars(found, across, y)
        end = across.at(panel.seconds)
        marks.append(element("line", x1=end, x2=end, y1=y, y2=y + len(panel.lanes) * _LANE, class_="limit"))
        y += len(panel.lanes) * _LANE + _GAP
    unit, factor = ("s", 1.0) if span >= 1 else ("ms", 1e3)
    for tick in nice_ticks(across.low * factor, span * factor, 10):
        marks.append(text(across.at(tick / factor), y - 24, f"{tick:g}", "middle"))
    marks.append(text(WIDTH / 2, y - 6, f"{unit} since the step began", "middle"))
    ordered = {name: used[name] for name in COLOURS if name in used}
    return element("div", legend(ordered), svg(y, marks, label="Gantt chart of one step"))


def _bars(found: Mapping[str, Bars], across: Axis, y: float) -> list[Html]:
    groups = []
    for name in COLOURS:
        bars = found.get(name)
        if bars is None:
            continue
        thin = name == "collective"
        rects = [
            element(
                "rect",
                element("title", "\n".join(words)),
                x=across.at(max(start, across.low)),  # a wait may have begun in the step before
                y=y + lane * _LANE + (12 if thin else 1),
                width=max(0.3, across.at(start + length) - across.at(max(start, across.low))),
                height=5 if thin else _LANE - 3,
            )
            for lane, start, length, words in zip(
                bars.lanes, bars.starts, bars.lengths, bars.hovers, strict=True
            )
            if start + length >= across.low
        ]
        groups.append(element("g", rects, fill=COLOURS[name]))
    return groups
