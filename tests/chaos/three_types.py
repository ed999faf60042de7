"""A job on five emulated devices of three types, cut unevenly in every way, and launches of it with faults."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hethub.checkpoints.store import CHECKPOINTS
from hethub.launch.history import HISTORY, Entry, read_history
from hethub.launch.history_check import check_history, check_journal, compare_histories
from hethub.launch.journal import Event, read_journal
from hethub.specs.plan import Plan, load_plan
from tests.launch.small_job import MODEL, Launch, Result, write_plan

CLUSTER = """\
name: three-types
device_types:
  fast: {vendor: cpu, memory_mib: 4, memory_bandwidth_gb_s: 2.0, peak_gflops: {fp32: 0.4}}
  middle: {vendor: cpu, memory_mib: 4, memory_bandwidth_gb_s: 1.5, peak_gflops: {fp32: 0.3}}
  slow: {vendor: cpu, memory_mib: 4, memory_bandwidth_gb_s: 1.0, peak_gflops: {fp32: 0.2}}
node_groups:
  - {name: a, device_type: fast, nodes: 1, devices_per_node: 1, intra_link: {bandwidth_mb_s: 200, latency_us: 50},
     inter_link: {bandwidth_mb_s: 40, latency_us: 50}, zone: desk}
  - {name: b, device_type: middle, nodes: 1, devices_per_node: 2, intra_link: {bandwidth_mb_s: 200, latency_us: 50},
     inter_link: {bandwidth_mb_s: 40, latency_us: 50}, zone: desk}
  - {name: c, device_type: slow, nodes: 1, devices_per_node: 2, intra_link: {bandwidth_mb_s: 200, latency_us: 50},
     inter_link: {bandwidth_mb_s: 40, latency_us: 50}, zone: shelf}
links:
  - {between: [desk, shelf], bandwidth_mb_s: 20, latency_us: 100, transport: host-staged}
workload: {model: config.json, sequence_length: 16, global_batch: 8, precision: fp32, optimizer: adamw}
emulated: {time_scale: 5}
"""
# Two pipelines; in the first a stage of two replicas, one of them a group of unlike ranks.
PIPELINES = [
    {
        "micro_batches": 2,
        "micro_batch_rows": 3,
        "stages": [
            {
                "layers": [0, 3],
                "in_flight": 2,
                "replicas": [
                    {
                        "rows": 2,
                        "ranks": [
                            {"device": "a/0/0", "heads": 3, "ffn": 16, "vocab": 160},
                            {"device": "b/0/0", "heads": 1, "ffn": 8, "vocab": 96},
                        ],
                    },
                    {"rows": 1, "ranks": [{"device": "c/0/0", "heads": 4, "ffn": 24, "vocab": 256}]},
                ],
            },
            {
                "layers": [3, 5],
                "in_flight": 1,
                "replicas": [
                    {"rows": 3, "ranks": [{"device": "b/0/1", "heads": 4, "ffn": 24, "vocab": 256}]}
                ],
            },
        ],
    },
    {
        "micro_batches": 2,
        "micro_batch_rows": 1,
        "stages": [
            {
                "layers": [0, 5],
                "in_flight": 1,
                "replicas": [
                    {"rows": 1, "ranks": [{"device": "c/0/1", "heads": 4, "ffn": 24, "vocab": 256}]}
                ],
            }
        ],
    },
]
JOB: dict[str, Any] = {
    "cluster": "cluster.yaml",
    "plan": "plan.yaml",
    "data": {"files": ["text.txt"], "tokenizer": "bytes", "held_out": 0.1},
    "steps": 12,
    "seed": 1,
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 2},
    "output": "run",
    "history": {"digest_every": 2},
    "checkpoint": {"every": 3, "keep": 2},
}


def write_job(folder: Path, cluster_text: str = CLUSTER, **changes: Any) -> None:
    """Write the job and all that it names; `changes` are keys of the job file. JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cluster.yaml").write_text(cluster_text)
    (folder / "config.json").write_text(json.dumps({"name": "small", **MODEL}))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    write_plan(folder, PIPELINES)
    (folder / "job.yaml").write_text(json.dumps({**JOB, **changes}))


# Rows by speed: whoever is slower than its figures, or a slow link between the zones, keeps all others.
_BY_ROWS = {
    "micro_batches": 2,
    "micro_batch_rows": 24,
    "stages": [
        {
            "layers": [0, 5],
            "in_flight": 2,
            "replicas": [
                {"rows": 7, "ranks": [{"device": "a/0/0", "heads": 4, "ffn": 24, "vocab": 256}]},
                {
                    "rows": 10,
                    "ranks": [{"devices": "b/0/0-1", "count": 2, "heads": 2, "ffn": 12, "vocab": 128}],
                },
                {
                    "rows": 7,
                    "ranks": [{"devices": "c/0/0-1", "count": 2, "heads": 2, "ffn": 12, "vocab": 128}],
                },
            ],
        }
    ],
}


def plan_by_rows(folder: Path) -> Plan:
    """One stage over all devices, for a larger batch and a slower link between the zones."""
    write_job(folder)
    text = CLUSTER.replace("global_batch: 8", "global_batch: 48").replace("mb_s: 20,", "mb_s: 5,")
    (folder / "cluster.yaml").write_text(text)
    write_plan(folder, [_BY_ROWS])
    return load_plan(folder / "plan.yaml")[0]


@dataclass(frozen=True)
class Ran:
    """A launch that has ended."""

    folder: Path
    result: Result
    left: list[str]

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def summary(self) -> dict[str, Any]:
        """As written."""
        found: dict[str, Any] = json.loads((self.run / "summary.json").read_text())
        return found

    def history(self) -> list[Entry]:
        """All entries; every line must be one."""
        entries, problems = read_history(self.run / HISTORY)
        assert problems == []
        return entries

    def journal(self) -> list[Event]:
        """All events; every line must be one."""
        events, problems = read_journal(self.run)
        assert problems == []
        return events

    def killed(self) -> int:
        """Workers that a fault killed. Two that die together are one failure."""
        return sum(log.read_text().count("killed on purpose") for log in (self.run / "logs").glob("*.log"))

    def steps_saved(self) -> list[int]:
        """Steps of the checkpoints in the run folder."""
        return sorted(
            int(p.name.removeprefix("step-")) for p in (self.run / CHECKPOINTS).glob("step-????????")
        )


def launch(folder: Path, *arguments: str, job: str = "job.yaml", seconds: float = 240.0) -> Ran:
    """Launch and wait for the end."""
    return ended(Launch(folder, *arguments, job=job), seconds)


def ended(started: Launch, seconds: float = 240.0) -> Ran:
    """Wait for the end of a launch, whatever it leaves behind."""
    try:
        result = started.end(seconds)
        return Ran(started.folder, result, started.left())
    finally:
        started.close()


def check_invariants(ran: Ran, unbroken: Ran, steps: int, *, relative: float = 1e-6) -> None:
    """I1 to I7, by the histories and by what is left on the machine."""
    assert ran.result.exit_code == 0, ran.result.err  # I7
    entries, events = ran.history(), ran.journal()
    assert check_history(entries, steps) == []  # I1, I2, I3
    assert compare_histories(entries, unbroken.history(), relative=relative) == []  # I1, I2
    assert check_journal(entries, events, steps) == []  # I5, I6, I7
    assert ran.summary()["history_problems"] == []
    assert ran.left == []  # I4
    assert not list(ran.run.glob("*.bin")) and not (ran.run / "lease.json").exists()
    assert not list((ran.run / CHECKPOINTS).glob("*.attempt-*"))
    assert "Traceback" not in ran.result.err


def kill(process: int) -> None:
    """SIGKILL."""
    os.kill(process, signal.SIGKILL)
