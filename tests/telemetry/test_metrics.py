"""The table of metrics keeps to Prometheus' conventions, and the page that shows it is current."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hethub.checkpoints.restarts import Cause
from hethub.telemetry.families import Histogram, Series, registry_of
from hethub.telemetry.metrics import ACTIVITY_OF_KIND, METRICS, Metric, Scope

UNITS = ("seconds", "bytes", "ratio", "celsius", "joules", "watts")
NEVER = {"step", "micro_batch", "action", "layer", "error", "run_uuid", "host"}


@pytest.mark.parametrize("entry", METRICS.values(), ids=list(METRICS))
def test_names_and_labels_keep_to_the_conventions(entry: Metric) -> None:
    assert re.fullmatch(r"hethub_[a-z_]+", entry.name)
    assert entry.name.endswith("_total") == (entry.kind == "counter")
    assert entry.name.endswith("_info") == (entry.kind == "info")
    stem = entry.name.removesuffix("_total")
    if entry.unit:
        assert stem.endswith(f"_{entry.unit}")
        assert entry.unit in UNITS
    else:
        assert not stem.endswith(UNITS) or "_per_" in stem
    assert not NEVER & set(entry.label_names)
    assert len(set(entry.label_names)) == len(entry.label_names)
    assert entry.help.endswith(".")
    assert set(entry.values) <= set(entry.labels)
    assert entry.scope == Scope.RUN or entry.kind != "histogram"


def test_activities_are_the_timelines_and_what_is_outside_of_it() -> None:
    shares = {"busy", "recompute", "exposed_communication", "bubble", "idle", "unaccounted"}
    assert set(ACTIVITY_OF_KIND.values()) == shares | {"checkpoint", "evaluation", "stalled"}


def test_only_what_the_table_has_can_be_served() -> None:
    series = Series()
    with pytest.raises(KeyError):
        series.set("hethub_other", 1.0, {"run": "a"})
    with pytest.raises(ValueError, match="has labels"):
        series.set("hethub_loss", 1.0, {"run": "a", "step": "3"})
    with pytest.raises(KeyError):
        series.set("hethub_loss", 1.0, {"name": "a"})


def test_what_is_served_is_read_back_as_it_was() -> None:
    series = Series()
    series.set("hethub_loss", 2.5, {"run": 'a "b"\n\\'})
    series.zero("hethub_faults_total", {"run": "a"})
    series.add("hethub_faults_total", 2, {"run": "a", "kind": "stall"})
    histogram = Histogram((0.1, 1.0))
    for value in (0.1, 0.5, 3.0):
        histogram.observe(value)
    series.set("hethub_step_duration_seconds", histogram, {"run": "a"})
    text = generate_latest(registry_of(series.families)).decode()
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples["hethub_loss", 'a "b"\n\\'] == 2.5
    assert samples["hethub_faults_total", "a", "stall"] == 2
    assert samples["hethub_faults_total", "a", "node"] == 0
    assert samples["hethub_step_duration_seconds_count", "a"] == 3
    assert samples["hethub_step_duration_seconds_bucket", "0.1", "a"] == 1
    assert samples["hethub_step_duration_seconds_bucket", "1.0", "a"] == 2
    assert samples["hethub_step_duration_seconds_bucket", "+Inf", "a"] == 3
    assert samples["hethub_step_duration_seconds_sum", "a"] == pytest.approx(3.6)
    assert len(series) == 1 + len(Cause) + 5


def test_the_page_is_what_the_code_says() -> None:
    script = Path(__file__).parents[2] / "docs" / "metrics.py"
    found = runpy.run_path(str(script))
    text = found["PAGE"].read_text(encoding="utf-8")
    assert found["written"](text) == text, "run `python docs/metrics.py`"
