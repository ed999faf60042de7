"""A real Prometheus for tests (Debian package `prometheus`), and a run that it scrapes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hethub.planners.answer import answer
from hethub.specs.cluster import load_cluster
from hethub.telemetry.rule_files import alert_file, recording_file
from hethub.telemetry.rules import Durations
from tests.chaos.three_types import CLUSTER, write_job
from tests.launch.small_job import Launch
from tests.processes import until

__all__ = ["Prometheus", "Sample", "ScrapedRun", "prometheus_running", "quick_rules", "scraped", "until"]

SCRAPE_SECONDS = 1
RULES_FACTOR = 1 / 30  # minutes of the rules are seconds here
_START_SECONDS = 60.0
_RUN_SECONDS = 150.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One element of an instant query's answer."""

    labels: dict[str, str]
    value: float


def _write_config(path: Path, targets: Sequence[Path], rules: Sequence[Path]) -> None:
    """Scrape what `targets` files list, every second."""
    pause = f"{SCRAPE_SECONDS}s"
    found = {"files": [str(path) for path in targets], "refresh_interval": "1s"}
    content = {
        "global": {"scrape_interval": pause, "evaluation_interval": pause},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [{"job_name": "hethub", "file_sd_configs": [found]}],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))  # JSON is YAML


class Prometheus:
    """A server on a free port of this machine, with its data and log in `folder`."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.address}",
                    "--log.level=warn",
                ],
                stdout=log,
                stderr=log,
            )

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer of its API. Raises AssertionError with the server's words where it refuses."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"http://{self.address}/api/v1/{path}?{query}", timeout=20) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[Sample]:
        """An instant query, now."""
        data = self.get("query", query=expression)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(entry["metric"], float(entry["value"][1])) for entry in data["result"]]

    def value(self, expression: str) -> float:
        """The one value of a query."""
        (sample,) = self.query(expression)
        return sample.value

    def alerts(self) -> list[dict[str, Any]]:
        """Alerts, pending and firing."""
        found: list[dict[str, Any]] = self.get("alerts")["alerts"]
        return found

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=2):
                return True
        except OSError:
            if self._process.poll() is not None:
                raise AssertionError(self.log.read_text()) from None
            return False

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def prometheus_running(folder: Path, config: Path) -> Iterator[Prometheus]:
    """A server that answers; skips where the binary is missing."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus here (Debian package `prometheus`)")
    server = Prometheus(folder, config)
    try:
        until(server.ready, _START_SECONDS, "Prometheus answers")
        yield server
    finally:
        server.close()


def quick_rules(folder: Path) -> list[Path]:
    """The recording and alert rules, thirty times as quick as the shipped ones."""
    folder.mkdir(parents=True, exist_ok=True)
    durations = Durations(RULES_FACTOR)
    files = {
        folder / "recording.yaml": recording_file(durations),
        folder / "alerts.yaml": alert_file(durations),
    }
    for path, text in files.items():
        path.write_text(text)
    return list(files)


@dataclass(frozen=True, slots=True)
class ScrapedRun:
    """A run of three device types that goes on, and the server that scrapes it."""

    folder: Path
    launch: Launch
    prometheus: Prometheus

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def firing(self) -> set[str]:
        """The names of the alerts that fire."""
        alerts = self.prometheus.alerts()
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


# With power and price, so that there is energy and money to count; a larger time scale, so that a loaded machine's
# overhead stays small beside modelled time.
PRICED = {
    "peak_gflops: {fp32: 0.4}}": "peak_gflops: {fp32: 0.4}, power_watts: 300, usd_per_hour: 2.0}",
    "peak_gflops: {fp32: 0.3}}": "peak_gflops: {fp32: 0.3}, power_watts: 200, usd_per_hour: 1.5}",
    "peak_gflops: {fp32: 0.2}}": "peak_gflops: {fp32: 0.2}, power_watts: 100, usd_per_hour: 0.5}",
    "time_scale: 5": "time_scale: 40",
}


def priced_cluster() -> str:
    """The cluster file of three types with powers and prices."""
    text = CLUSTER
    for old, new in PRICED.items():
        assert old in text
        text = text.replace(old, new)
    return text


def _add_bounds(folder: Path) -> None:
    """Give the plan by hand the bounds that `hethub plan` finds for its cluster."""
    cluster, workload = load_cluster(folder / "cluster.yaml")
    assert workload is not None
    plan = json.loads((folder / "plan.yaml").read_text())
    plan["bounds"] = answer(cluster, workload).plan.bounds
    (folder / "plan.yaml").write_text(json.dumps(plan))


@contextmanager
def scraped(
    folder: Path,
    *,
    steps: int = 12,
    last: int = 100_000,
    rules: Sequence[Path] = (),
    cluster: str | None = None,
    **job: Any,
) -> Iterator[ScrapedRun]:
    """A run of `last` steps, of which a Prometheus has seen at least `steps`; `job` are keys of its file."""
    write_job(
        folder,
        cluster_text=priced_cluster() if cluster is None else cluster,
        **{
            "steps": last,
            "evaluate": {"every": 5, "rows": 8},
            "checkpoint": {"every": 3, "keep": 2},
            **job,
        },
    )
    _add_bounds(folder)
    targets = folder / "run" / "telemetry" / "targets.json"
    config = folder / "prometheus" / "prometheus.yml"
    _write_config(config, [targets], rules)
    with prometheus_running(folder / "prometheus", config) as server:
        launch = Launch(folder)
        try:

            def seen() -> bool:
                if launch.process.poll() is not None:
                    raise AssertionError(launch.end().err)
                found = server.query("hethub_run_step")
                return bool(found) and found[0].value >= steps

            until(seen, _RUN_SECONDS, f"{steps} steps are scraped")
            yield ScrapedRun(folder, launch, server)
        finally:
            try:
                if launch.process.poll() is None:
                    launch.process.send_signal(signal.SIGTERM)
                    launch.end(60)
            finally:
                launch.close()
