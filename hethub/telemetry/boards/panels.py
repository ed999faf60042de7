"""What a board is made of, and how it becomes Grafana's JSON: rows of panels, each with its queries.

A panel states what it shows and how to read it; `board_json` alone knows the foundation SDK.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hethub.errors import MachineError

if TYPE_CHECKING:
    from grafana_foundation_sdk.models.common import DataSourceRef
    from grafana_foundation_sdk.models.dashboard import Threshold

__all__ = ["DATA_SOURCE", "Board", "Look", "Panel", "Query", "Row", "Steps", "Variable", "board_json"]

DATA_SOURCE = "datasource"  # the variable that every query reads its data source from
_GREEN, _YELLOW, _RED, _BLUE = "green", "yellow", "red", "blue"


class Look(StrEnum):
    """How a panel draws its queries."""

    STAT = "stat"
    GAUGE = "gauge"
    LINES = "timeseries"
    STACK = "stack"  # lines on top of each other, which together make a whole
    BARS = "bargauge"
    HEATMAP = "heatmap"  # one row for each series, time to the right
    TABLE = "table"


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and what its series are called; `{{label}}` stands for a label's value."""

    expression: str
    legend: str


@dataclass(frozen=True, slots=True)
class Steps:
    """Where a value's colour changes: `poor` and `good` in the panel's unit; the better end is where `good` lies."""

    poor: float
    good: float

    def thresholds(self) -> list[Threshold]:
        """Grafana's steps, lowest first."""
        from grafana_foundation_sdk.models.dashboard import Threshold

        if self.good > self.poor:
            return [Threshold(None, _RED), Threshold(self.poor, _YELLOW), Threshold(self.good, _GREEN)]
        return [Threshold(None, _GREEN), Threshold(self.good, _YELLOW), Threshold(self.poor, _RED)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One panel. `number` is its id on the board, which links keep: never renumber.

    `unit` is Grafana's name of the unit; `low` and `high` end the axis; `description` says how to read it.
    """

    number: int
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    look: Look = Look.LINES
    steps: Steps | None = None
    low: float | None = 0.0
    high: float | None = None
    decimals: int | None = None
    width: int = 8
    height: int = 8


@dataclass(frozen=True, slots=True)
class Row:
    """A titled row of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A choice at the top of a board: one value of a query, or several.

    `pattern` is Grafana's regular expression that takes the value out of the query's text; `hidden` variables only
    serve titles.
    """

    name: str
    label: str
    query: str
    several: bool = False
    hidden: bool = False
    pattern: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One dashboard; `uid` is what links hold."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]
    tags: tuple[str, ...] = field(default=("hethub",))

    def panels(self) -> list[Panel]:
        """All panels, in reading order."""
        return [panel for row in self.rows for panel in row.panels]


def board_json(board: Board) -> str:
    """Grafana's JSON of a board: the same text each time. Raises MachineError without the SDK."""
    try:
        from grafana_foundation_sdk.builders import dashboard as build
        from grafana_foundation_sdk.cog.encoder import JSONEncoder
        from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DashboardLinkType
    except ImportError as error:
        raise MachineError(
            "dashboards: the Grafana foundation SDK is missing. Install hethub[dashboards]."
        ) from error
    made = (
        build.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(list(board.tags))
        .readonly()
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            build.DashboardLink("HetHub's boards")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["hethub"])
            .keep_time(True)
            .include_vars(True)
        )
        .variables(
            [
                _data_source_variable(),
                *(_query_variable(each) for each in board.variables),
                _window_variable(),
            ]
        )
    )
    for number, row in enumerate(board.rows):
        made.with_row(build.Row(row.title).id(1000 + number))
        for panel in row.panels:
            made.with_panel(_panel(panel))
    # Sorted, so that the SDK's own order of keys is no part of the file.
    return json.dumps(made.build(), cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _source() -> DataSourceRef:
    from grafana_foundation_sdk.models.common import DataSourceRef

    return DataSourceRef(type_val="prometheus", uid=f"${{{DATA_SOURCE}}}")


def _data_source_variable() -> Any:
    from grafana_foundation_sdk.builders import dashboard as build

    return build.DatasourceVariable(DATA_SOURCE).label("Data source").type("prometheus")


def _window_variable() -> Any:
    """What rates are taken over: at least some steps, so it is the reader's choice and not the picture's width."""
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.models.dashboard import VariableOption

    lengths = ("30s", "1m", "5m", "15m", "1h")
    return (
        build.IntervalVariable("window")
        .label("Averaged over")
        .description("Rates and shares are over this window. Choose at least three steps.")
        .values(",".join(lengths))
        .options([VariableOption(selected=each == "1m", text=each, value=each) for each in lengths])
        .current(VariableOption(selected=True, text="1m", value="1m"))
    )


def _query_variable(variable: Variable) -> Any:
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.models import dashboard as model

    made = (
        build.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(_source())
        .query({"query": variable.query, "refId": f"variable-{variable.name}"})
        .definition(variable.query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NATURAL_ASC)
        .multi(variable.several)
        .include_all(variable.several)
        .regex(variable.pattern)
        .hide(model.VariableHide.HIDE_VARIABLE if variable.hidden else model.VariableHide.DONT_HIDE)
    )
    if variable.several:
        made.all_value(".*").current(model.VariableOption(selected=True, text="All", value="$__all"))
    return made


def _panel(panel: Panel) -> Any:
    """The SDK's builder of a panel."""
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.builders import prometheus
    from grafana_foundation_sdk.models import dashboard as model
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    made = _DRAWN[panel.look](panel)
    made.id(panel.number).title(panel.title).description(panel.description).datasource(_source())
    made.span(panel.width).height(panel.height).unit(panel.unit).no_value("no data")
    if panel.low is not None:
        made.min(panel.low)
    if panel.high is not None:
        made.max(panel.high)
    if panel.decimals is not None:
        made.decimals(panel.decimals)
    steps = [model.Threshold(None, _BLUE)] if panel.steps is None else panel.steps.thresholds()
    made.thresholds(build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
    for letter, query in zip("ABCDEFGH", panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter)
        if panel.look in {Look.STAT, Look.GAUGE, Look.BARS, Look.TABLE}:
            target.instant()
        else:
            target.range()
        if panel.look is Look.TABLE:
            target.format(PromQueryFormat.TABLE)
        made.with_target(target)
    return made


def _reduced(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import bargauge, gauge, stat
    from grafana_foundation_sdk.builders.common import ReduceDataOptions
    from grafana_foundation_sdk.models import common

    last = ReduceDataOptions().calcs(["lastNotNull"])
    if panel.look is Look.GAUGE:
        return gauge.Panel().reduce_options(last)
    if panel.look is Look.BARS:
        return (
            bargauge.Panel()
            .reduce_options(last)
            .orientation(common.VizOrientation.HORIZONTAL)
            .display_mode(common.BarGaugeDisplayMode.BASIC)
        )
    colour = common.BigValueColorMode.NONE if panel.steps is None else common.BigValueColorMode.VALUE
    # A name is what a panel of names shows; figures have their title for that.
    mode = common.BigValueTextMode.NAME if panel.unit == "string" else common.BigValueTextMode.AUTO
    return (
        stat.Panel()
        .reduce_options(last)
        .color_mode(colour)
        .text_mode(mode)
        .graph_mode(common.BigValueGraphMode.NONE)
    )


def _lines(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import timeseries
    from grafana_foundation_sdk.builders.common import (
        GraphThresholdsStyleConfig,
        StackingConfig,
        VizLegendOptions,
        VizTooltipOptions,
    )
    from grafana_foundation_sdk.models import common

    made = (
        timeseries.Panel()
        .legend(VizLegendOptions().show_legend(True).placement(common.LegendPlacement.BOTTOM))
        .tooltip(VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
        .span_nulls(60_000)
    )
    if panel.look is Look.STACK:
        made.stacking(StackingConfig().mode(common.StackingMode.NORMAL)).fill_opacity(70).line_width(0)
    elif panel.steps is not None:
        made.thresholds_style(GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    return made


def _heatmap(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import heatmap
    from grafana_foundation_sdk.models.heatmap import HeatmapColorMode

    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("RdYlGn").steps(64)
    if panel.low is not None and panel.high is not None:
        colours.min(panel.low).max(panel.high)
    return heatmap.Panel().calculate(False).color(colours).cell_gap(1).show_legend()


def _table(panel: Panel) -> Any:
    from grafana_foundation_sdk.builders import table
    from grafana_foundation_sdk.models.dashboard import DataTransformerConfig

    hidden = dict.fromkeys(("Time", "__name__", "instance", "job"), True)
    return table.Panel().with_transformation(
        DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
    )


_DRAWN = {
    Look.STAT: _reduced,
    Look.GAUGE: _reduced,
    Look.BARS: _reduced,
    Look.LINES: _lines,
    Look.STACK: _lines,
    Look.HEATMAP: _heatmap,
    Look.TABLE: _table,
}
