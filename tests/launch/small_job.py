"""A job so small that it trains in a moment: two unlike emulated devices, neither of which holds the model."""

from __future__ import annotations

import gc
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hethub.cli.main import run
from hethub.specs.cluster import cluster_to_spec, load_cluster
from hethub.specs.workload import workload_to_spec

CLUSTER = """\
name: two-speeds
device_types:
  fast: {vendor: cpu, memory_mib: 0.25, memory_bandwidth_gb_s: 2.0, peak_gflops: {fp32: 1.0}}
  slow: {vendor: cpu, memory_mib: 0.25, memory_bandwidth_gb_s: 1.0, peak_gflops: {fp32: 0.5}}
node_groups:
  - {name: a, device_type: fast, nodes: 1, devices_per_node: 1, intra_link: {bandwidth_mb_s: 200, latency_us: 50},
     inter_link: {bandwidth_mb_s: 40, latency_us: 50}, zone: desk}
  - {name: b, device_type: slow, nodes: 1, devices_per_node: 1, intra_link: {bandwidth_mb_s: 200, latency_us: 50},
     inter_link: {bandwidth_mb_s: 40, latency_us: 50}, zone: shelf}
links:
  - {between: [desk, shelf], bandwidth_mb_s: 20, latency_us: 100, transport: host-staged}
workload: {model: config.json, sequence_length: 16, global_batch: 8, precision: fp32, optimizer: adamw}
emulated: {time_scale: 20}
"""
JOB = """\
cluster: cluster.yaml
plan: auto
data: {files: [text.txt], tokenizer: bytes, held_out: 0.1}
steps: 3
seed: 1
evaluate: {every: 3, rows: 16}
optimizer: {learning_rate: 3e-3, warmup_steps: 1}
output: run
"""
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


def write_job(folder: Path) -> None:
    """Write cluster.yaml, job.yaml, config.json and text.txt."""
    (folder / "cluster.yaml").write_text(CLUSTER)
    (folder / "job.yaml").write_text(JOB)
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)


def write_plan(folder: Path, pipelines: Sequence[Mapping[str, Any]]) -> None:
    """Write plan.yaml for the folder's cluster.yaml. JSON is YAML."""
    cluster, workload = load_cluster(folder / "cluster.yaml")
    assert workload is not None
    plan = {
        "version": 1,
        "pipelines": pipelines,
        "cluster": cluster_to_spec(cluster),
        "workload": workload_to_spec(workload),
    }
    (folder / "plan.yaml").write_text(json.dumps(plan))


def fix_plan(folder: Path) -> None:
    """Give the job a plan of two stages, the first on the fast device, so that its actions can be named."""
    whole = {"heads": 4, "ffn": 24, "vocab": 256}
    stages = [
        {
            "layers": [0, 4],
            "in_flight": 2,
            "replicas": [{"rows": 1, "ranks": [{"device": "a/0/0", **whole}]}],
        },
        {
            "layers": [4, 5],
            "in_flight": 1,
            "replicas": [{"rows": 1, "ranks": [{"device": "b/0/0", "vocab": 256}]}],
        },
    ]
    write_plan(folder, [{"micro_batches": 8, "micro_batch_rows": 1, "stages": stages}])
    edit(folder / "job.yaml", ("plan: auto", "plan: plan.yaml"))


def edit(file: Path, *changes: tuple[str, str]) -> None:
    """Replace text in a file; every old text must be there."""
    text = file.read_text()
    for old, new in changes:
        assert old in text, f"{file.name} has no {old!r}"
        text = text.replace(old, new)
    file.write_text(text)


def listing(folder: Path) -> Mapping[str, bytes | None]:
    """Everything in a folder, with the contents of its files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Result:
    """What a command did."""

    exit_code: int
    out: str
    err: str


def hethub(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> Result:
    """Run the console script's entry point inside this process, in `folder`."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before, sys.argv = sys.argv, ["hethub", *map(str, arguments)]
    home = Path.cwd()
    os.chdir(folder)
    try:
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        os.chdir(home)
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        gc.enable()  # `hethub plan` turns it off for its short life
    out, err = capsys.readouterr()
    return Result(code, out, err)


_END_SECONDS = 90.0  # a launch that hangs fails its test


class Launch:
    """`hethub launch` as a process group of its own, marked so that whatever it leaves behind is found."""

    def __init__(self, folder: Path, *arguments: str, job: str = "job.yaml", before: str = "") -> None:
        """`before` is Python that changes what the launch would do by itself."""
        self.folder = folder
        program = ["-c", f"{before}\nfrom hethub.cli.main import run\nrun()"] if before else ["-m", "hethub"]
        # Not pytest's folder: Ray's sockets need a short path.
        self.temporary = Path(tempfile.mkdtemp(prefix="hh-"))
        self.process = subprocess.Popen(
            [sys.executable, *program, "launch", *([job] if job else []), *arguments],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def training(self) -> None:
        """Return when the first step is done."""
        self.says(r"step \d+/")  # quick steps may come several at once

    def says(self, pattern: str) -> None:
        """Return when it has said such a line, after those that were waited for before."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if re.search(pattern, line):
                return
        raise AssertionError(f"the launch ended before it said {pattern}")

    def worker(self, device: str) -> int:
        """The process of a device, as its log tells."""
        first = (self.folder / "run" / "logs" / f"{device.replace('/', '-')}.log").read_text().splitlines()[0]
        return int(first.split("process ")[1].split(",")[0])

    def end(self, seconds: float = _END_SECONDS) -> Result:
        """Wait for the end."""
        out, err = self.process.communicate(timeout=seconds)
        return Result(self.process.returncode, out, err)

    def close(self) -> None:
        """Kill it with its whole group if it has not ended, and remove its temporary files."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def left(self) -> list[str]:
        """Processes and files that it left behind."""
        return left_behind(self.temporary)


def wait_for_end(process: int) -> None:
    """Return when a process has ended; the test's own time limit is the limit."""
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    select.select([descriptor], [], [], 30)
    os.close(descriptor)


def left_behind(temporary: Path) -> list[str]:
    """Processes whose temporary folder this is, and what HetHub left in it."""
    found = [
        _content(Path(f"/proc/{process}/cmdline")).replace(b"\0", b" ").decode()
        for process in marked(temporary)
    ]
    return found + [str(path) for path in temporary.glob("hethub-*")]


def marked(temporary: Path) -> list[int]:
    """Processes whose temporary folder this is, those left out that have ended."""
    mark = f"TMPDIR={temporary}\0".encode()
    return [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit()
        and mark in _content(entry / "environ")
        and _content(entry / "stat").rpartition(b") ")[2][:1] not in (b"Z", b"")
    ]


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""  # the process has ended meanwhile, or is another user's


@contextmanager
def launched(folder: Path, *arguments: str) -> Iterator[Launch]:
    """A launch that is killed with its whole group if the test did not see it end."""
    launch = Launch(folder, *arguments)
    try:
        yield launch
    finally:
        launch.close()
