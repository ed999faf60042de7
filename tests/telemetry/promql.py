"""What stands in the shipped boards and rules, and which labels a PromQL expression gives, by the table of metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import promql_parser as parser
import pytest
import yaml

from hethub.telemetry.metrics import METRICS
from hethub.telemetry.rules import DEVICE_EXPORTERS

ROOT = Path(__file__).parents[2]
BOARDS = sorted((ROOT / "docker" / "grafana" / "boards").glob("*.json"))
RULES = sorted((ROOT / "docker" / "prometheus" / "rules").glob("*.yaml"))

_SCRAPED = frozenset({"job", "instance"})  # what Prometheus adds to every series
_OWN_SERIES = {"up": _SCRAPED, "ALERTS": frozenset({"alertname", "alertstate", "severity", "run"})}
_HISTOGRAM = {"_sum": frozenset(), "_count": frozenset(), "_bucket": frozenset({"le"})}
_VARIABLE_QUERIES = (
    re.compile(r"label_values\((?P<expression>.+), (?P<label>\w+)\)"),
    re.compile(r"query_result\((?P<expression>.+)\)"),
)

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: install Debian's package prometheus"
)

Labels = frozenset[str] | None
"""Label names; None where they are a foreign exporter's."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A PromQL expression of a shipped file, with Grafana's variables still in it, and where it stands.

    `labels` are names that the file expects in the answer: of a legend or a variable. Panels have a title and a unit.
    """

    place: str
    text: str
    labels: frozenset[str] = frozenset()
    title: str = ""
    unit: str = ""

    def promql(self, **variables: str) -> str:
        """With values for the variables; those that are not given match everything."""
        values = {"run": ".*", "device_type": ".*", "node": ".*", "device": ".*", "window": "1m"} | variables
        text = self.text.replace('="$run"', '=~"$run"')
        return re.sub(r"\$(\w+)", lambda match: values[match[1]], text)


def panel_expressions() -> list[Expression]:
    """Of every panel of every shipped board."""
    found = []
    for path in BOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                legend = frozenset(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
                place = f"{path.stem} {panel['id']}{target['refId']} {panel['title']}"
                unit = panel["fieldConfig"]["defaults"]["unit"]
                found.append(Expression(place, target["expr"], legend, panel["title"], unit))
    return found


def variable_expressions() -> list[Expression]:
    """Of every variable of every shipped board."""
    found = []
    for path in BOARDS:
        for variable in json.loads(path.read_text())["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = next(filter(None, (p.fullmatch(variable["query"]["query"]) for p in _VARIABLE_QUERIES)))
            label = match.groupdict().get("label")
            place = f"{path.stem} variable {variable['name']}"
            found.append(Expression(place, match["expression"], frozenset({label} if label else ())))
    return found


def rule_expressions() -> dict[str, Expression]:
    """Of every shipped rule, by the name of its series (with its source) or alert."""
    found = {}
    for path in RULES:
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                name = rule.get("alert") or " ".join((rule["record"], *rule.get("labels", {}).values()))
                texts = " ".join(rule.get("annotations", {}).values())
                found[name] = Expression(name, rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", texts)))
    return found


def promtool(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run promtool in a folder."""
    return subprocess.run(
        ["promtool", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def selectors(text: str) -> list[str]:
    """Every selector of series in an expression, without its range."""
    found: list[str] = []

    def note(node: parser.Expr) -> None:
        if isinstance(node, parser.MatrixSelector):
            found.append(str(node.vector_selector))
        elif isinstance(node, parser.VectorSelector):
            found.append(str(node))

    parser.walk(parser.parse(text), note)
    return found


# --- which labels an expression gives ---------------------------------------------------------------------


def labels_of(text: str, recorded: Mapping[str, Labels]) -> Labels:
    """The labels of an expression's answer. Raises AssertionError for a name or a label that is not registered.

    `recorded` are the labels of series that recording rules make.
    """
    return _labels(parser.parse(text), recorded)


def recorded_labels() -> dict[str, Labels]:
    """The labels of every recorded series that is not also a metric of the table."""
    found: dict[str, Labels] = {}
    for name, rule in rule_expressions().items():
        if ":" in name:
            found[name] = labels_of(rule.text, found)
    return found


def _labels(node: parser.Expr, recorded: Mapping[str, Labels]) -> Labels:
    for kind, labels_of_kind in _KINDS.items():
        if isinstance(node, kind):
            return labels_of_kind(node, recorded)
    return frozenset()  # a number or a text


def _selected(node: parser.VectorSelector, recorded: Mapping[str, Labels]) -> Labels:
    matchers = {matcher.name for matcher in node.matchers.matchers}
    if node.name is None or any(node.name in _names(e) for e in _foreign_sensors()):
        assert node.name is not None or matchers == {"__name__"}
        return None
    labels = _registered(node.name, recorded)
    assert labels is None or matchers <= labels, f"{node.name} has no labels {matchers - labels}"
    return labels


def _registered(name: str, recorded: Mapping[str, Labels]) -> Labels:
    if name in recorded:
        return recorded[name]
    if name in _OWN_SERIES:
        return _OWN_SERIES[name]
    extra: frozenset[str] = frozenset()
    for suffix, more in _HISTOGRAM.items():
        stem = name.removesuffix(suffix)
        if stem in METRICS and METRICS[stem].kind == "histogram":
            name, extra = stem, more
    assert name in METRICS, f"{name} stands in no table"
    return frozenset(METRICS[name].label_names) | _SCRAPED | extra


def _foreign_sensors() -> list[str]:
    return [sensor for exporter in DEVICE_EXPORTERS for sensor in exporter.sensors.values()]


def _names(sensor: str) -> set[str]:
    return set(re.findall(r"[A-Za-z_]\w*", sensor)) - {"__name__"}


def _called(node: parser.Call, recorded: Mapping[str, Labels]) -> Labels:
    labels: Labels = frozenset()
    for argument in node.args:
        given = _labels(argument, recorded)
        labels = None if given is None else labels if labels is None else labels | given
    if labels is None:
        return None
    if node.func.name == "label_replace":
        return labels | {node.args[1].val}
    if node.func.name == "histogram_quantile":
        return labels - {"le"}
    return labels


def _aggregated(node: parser.AggregateExpr, recorded: Mapping[str, Labels]) -> Labels:
    labels = _labels(node.expr, recorded)
    if node.modifier is None:
        return labels if "topk" in str(node.op) else frozenset()
    named = frozenset(node.modifier.labels)
    assert labels is None or named <= labels, f"{node} has no labels {named - labels}"
    if node.modifier.type == parser.AggModifierType.By:
        return named
    return None if labels is None else labels - named


def _joined(node: parser.BinaryExpr, recorded: Mapping[str, Labels]) -> Labels:
    left, right = _labels(node.lhs, recorded), _labels(node.rhs, recorded)
    if isinstance(node.lhs, parser.NumberLiteral) or str(node.lhs) == "time()":
        return right
    operator = str(node.op)
    modifier = node.modifier
    if modifier is not None and modifier.matching is not None:
        on = frozenset(modifier.matching.labels)
        for side in (left, right):
            assert side is None or on <= side, f"{node} has no labels {on - side}"
        grouped = frozenset(modifier.group_labels or ())
        if modifier.card == parser.VectorMatchCardinality.OneToOne:
            left = on
        elif grouped:
            left = None if left is None else left | grouped
    if operator == "or" and left is not None and right is not None:
        return left | right
    return left


_KINDS = {
    parser.VectorSelector: _selected,
    parser.MatrixSelector: lambda node, recorded: _selected(node.vector_selector, recorded),
    (parser.ParenExpr, parser.SubqueryExpr, parser.UnaryExpr): lambda node, recorded: _labels(
        node.expr, recorded
    ),
    parser.Call: _called,
    parser.AggregateExpr: _aggregated,
    parser.BinaryExpr: _joined,
}
