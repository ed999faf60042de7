"""Reads a run's endpoints, as Prometheus would: the targets of its `file_sd` file, their samples, and rates between two
looks."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hethub.errors import InputError, not_installed

__all__ = ["Look", "Samples", "look_at", "rates", "targets_of"]

Labels = tuple[tuple[str, str], ...]
"""Label names and values, by name."""

_TIMEOUT_SECONDS = 2.0
_AT_ONCE = 16
_MOST_BYTES = 1 << 26  # of a target's answer
_DIRECT = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # a proxy would not reach a node's own address


class Samples:
    """Values of metrics by name and labels."""

    def __init__(self, samples: Iterable[tuple[str, Mapping[str, str], float]] = ()) -> None:
        self._by_name: dict[str, dict[Labels, float]] = {}
        for name, labels, value in samples:
            self._by_name.setdefault(name, {})[tuple(sorted(labels.items()))] = value

    def of(self, name: str, **wanted: str) -> Iterator[tuple[dict[str, str], float]]:
        """(labels, value) of every series of a metric that has the wanted labels."""
        for labels, value in self._by_name.get(name, {}).items():
            found = dict(labels)
            if all(found.get(key) == text for key, text in wanted.items()):
                yield found, value

    def one(self, name: str, **wanted: str) -> float | None:
        """The value of a metric that has one series with the wanted labels; None without it."""
        return next((value for _, value in self.of(name, **wanted)), None)

    def total(self, name: str, **wanted: str) -> float | None:
        """The sum over all series with the wanted labels; None without any."""
        values = [value for _, value in self.of(name, **wanted)]
        return sum(values) if values else None

    def items(self) -> Iterator[tuple[str, Labels, float]]:
        """All of them."""
        for name, series in self._by_name.items():
            for labels, value in series.items():
                yield name, labels, value

    def get(self, name: str, labels: Labels) -> float | None:
        """The value of exactly this series."""
        return self._by_name.get(name, {}).get(labels)


@dataclass(frozen=True, slots=True)
class Look:
    """All targets at one moment (seconds of the monotonic clock); `silent` are those that did not answer."""

    at_seconds: float
    samples: Samples
    silent: tuple[str, ...]


def targets_of(file: Path) -> list[str]:
    """The addresses in a `file_sd` file. Raises InputError where there is none that can be read."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return [str(target) for entry in entries for target in entry["targets"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file}: names no endpoints ({type(error).__name__}). Is the run going on, with telemetry?"
        ) from None


def look_at(targets: Iterable[str], now: float) -> Look:
    """Scrape all targets at once. Raises MachineError without the package prometheus_client."""
    listed = list(targets)
    with ThreadPoolExecutor(_AT_ONCE) as readers:
        answers = list(readers.map(_scrape, listed))
    silent = tuple(target for target, answer in zip(listed, answers, strict=True) if answer is None)
    return Look(now, Samples(sample for answer in answers if answer for sample in answer), silent)


def _scrape(target: str) -> list[tuple[str, dict[str, str], float]] | None:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError:
        raise not_installed("prometheus_client", "the view", "launch") from None

    try:
        # A plain http address from the run's own file; nothing is sent but the request.
        with _DIRECT.open(f"http://{target}/metrics", timeout=_TIMEOUT_SECONDS) as answer:
            text = answer.read(_MOST_BYTES).decode("utf-8", errors="replace")
        families = text_string_to_metric_families(text)
        return [(s.name, dict(s.labels), float(s.value)) for family in families for s in family.samples]
    except (OSError, http.client.HTTPException, ValueError):  # a URLError is an OSError
        return None


def rates(before: Look, after: Look) -> Samples:
    """By how much each counter (`*_total`) grew a second; one that went down began anew, and is left out."""
    seconds = after.at_seconds - before.at_seconds
    found = []
    for name, labels, value in after.samples.items():
        earlier = before.samples.get(name, labels)
        if name.endswith("_total") and earlier is not None and value >= earlier and seconds > 0:
            found.append((name, dict(labels), (value - earlier) / seconds))
    return Samples(found)
