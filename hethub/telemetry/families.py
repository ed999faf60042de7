"""From values to what Prometheus reads: only metrics of the table, with its labels, counters at 0 from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry
from prometheus_client.samples import Sample

from hethub.telemetry.metrics import METRICS, Metric

__all__ = ["Histogram", "Series", "registry_of"]


class Histogram:
    """Counts of values by bucket, and their sum. `bounds` are the buckets' upper ends, ascending, without infinity."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[sum(value > bound for bound in self.bounds)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper end, values up to it) of every bucket."""
        found, total = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Series:
    """The series of one scrape or of one process's life, by metric and label values."""

    def __init__(self) -> None:
        self._values: dict[str, dict[tuple[str, ...], float | Histogram]] = {}

    def set(self, name: str, value: float | Histogram, labels: Mapping[str, str]) -> None:
        """Give a series its value. Raises KeyError for a metric that is not in the table, ValueError where the labels
        are not the table's."""
        entry = METRICS[name]
        if len(labels) != len(entry.label_names):
            raise ValueError(f"{name}: has labels {entry.label_names}, given {tuple(labels)}")
        self._values.setdefault(name, {})[tuple([labels[label] for label in entry.label_names])] = value

    def add(self, name: str, amount: float, labels: Mapping[str, str]) -> None:
        """Let a counter grow, from 0 where it has no value."""
        entry = METRICS[name]
        series = self._values.setdefault(name, {})
        key = tuple([labels[label] for label in entry.label_names])
        before = series.get(key, 0.0)
        assert not isinstance(before, Histogram)
        series[key] = before + amount

    def get(self, name: str, labels: Mapping[str, str]) -> float | None:
        """The value of a series, None where it has none."""
        key = tuple([labels[label] for label in METRICS[name].label_names])
        value = self._values.get(name, {}).get(key)
        return None if isinstance(value, Histogram) else value

    def count(self, name: str) -> int:
        """How many series a metric has."""
        return len(self._values.get(name, {}))

    def total(self, name: str) -> float:
        """Sum of a metric's series; 0 where it has none."""
        return sum(v for v in self._values.get(name, {}).values() if not isinstance(v, Histogram))

    def zero(self, name: str, labels: Mapping[str, str]) -> None:
        """Begin all series of a metric whose labels are known beforehand at 0; `labels` are those of its scope."""
        entry = METRICS[name]
        for known in entry.known_labels():
            self.add(name, 0.0, {**labels, **dict(zip(entry.labels, known, strict=True))})

    def drop(self, name: str) -> None:
        """Forget all series of a metric."""
        self._values.pop(name, None)

    def __len__(self) -> int:
        """How many series a scrape returns."""
        return sum(
            len(value.counts) + 2 if isinstance(value, Histogram) else 1
            for series in self._values.values()
            for value in series.values()
        )

    def families(self) -> Iterator[Family]:
        """Everything, as prometheus-client wants it, in the order of the table."""
        for name, entry in METRICS.items():
            if name in self._values:
                yield _family(entry, self._values[name])


def _family(entry: Metric, values: Mapping[tuple[str, ...], float | Histogram]) -> Family:
    labels = entry.label_names
    if entry.kind == "histogram":
        histogram = HistogramMetricFamily(entry.name, entry.help, labels=labels)
        for key, value in list(values.items()):
            assert isinstance(value, Histogram)
            histogram.add_metric(key, value.cumulative(), value.sum)
        return histogram
    found: Family
    if entry.kind == "counter":
        found, sample = CounterMetricFamily(entry.name, entry.help, labels=labels), entry.name
    else:
        found, sample = GaugeMetricFamily(entry.name, entry.help, labels=labels), entry.name
    found.samples = [
        Sample(sample, dict(zip(labels, key, strict=True)), float(value), None, None)
        for key, value in list(values.items())
        if not isinstance(value, Histogram)
    ]
    return found


def registry_of(collect: Callable[[], Iterable[Family]]) -> CollectorRegistry:
    """A registry whose scrapes call `collect`, and nothing else."""

    class Collecting(Collector):
        def collect(self) -> Iterable[Family]:
            return collect()

        def describe(self) -> Iterable[Family]:
            return []

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collecting())
    return registry
