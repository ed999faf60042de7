"""What telemetry costs: training with it over training without, a scrape of a node of eight devices, the agent.

Two CPU workers, a core each, train the same plan twice: on one side they count, and an agent is scraped every second as
Prometheus would; on the other nobody counts. No emulated deadline hides the cost. The sides take turns (PAIRS pairs of
STEPS steps); `throughput_ratio` is the median of seconds without over seconds with. The agent whose scrape is timed and
whose memory is read serves eight devices with all their series; `agent_mib` is the most that it ever had resident.

The cheapest cheats, and what makes them fail:
- counting nothing: the counters must hold every step that was trained, and as many seconds as the timeline;
- serving nothing: a scrape must return MIN_SERIES series a device, and those of training must have changed;
- not scraping meanwhile: there must be a scrape for every 2 s of counted training;
- leaving work undone: the losses of both sides must be the same.

    .venv/bin/python benchmarks/telemetry_cost.py [--pairs N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines import (
    Ours,
    Pair,
    Training,
    alternate,
    idle_ratio,
    loss_differs,
    median_ratio,
    raw_of,
    text_of,
)
from bench.plans import cpu_cluster, llama_model, pipeline
from bench.results import print_figures, write_result
from hethub.specs.plan import Plan
from hethub.telemetry.counters import FIELDS, CountersFile, size_of
from hethub.telemetry.describe import used_nodes, write_nodes
from hethub.telemetry.folder import COUNTERS, agent_addresses, start_agent
from hethub.telemetry.metrics import METRICS, Scope

PAIRS, STEPS, WARM_UP = 31, 8, 2
MODEL = llama_model(hidden=256, layers=4, heads=4)
SEQUENCE, ROWS, MICRO_BATCHES = 64, 2, 8
SCRAPE_EVERY_SECONDS = 1.0
NODE_DEVICES, SCRAPES = 8, 100
MIN_SERIES = 28
LOSS_DIFFERS, IDLE_RATIO = 1e-4, 0.01
_START_SECONDS = 60.0


def main() -> int:
    """Measure, check, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=PAIRS, help="fewer for a try; nothing is written then")
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory(prefix="hethub-bench-") as folder:
        found, training, wrong = throughput(Path(folder), pairs)
        node, problems = a_node(Path(folder) / "node")
    figures = {
        "throughput_ratio": median_ratio(found),
        **{k: node[k] for k in ("scrape_seconds", "agent_mib")},
    }
    print_figures(figures)
    for text in (wrong := wrong + problems):
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong and pairs == PAIRS:
        raw = {"training": {**raw_of(found, STEPS), **training}, "node": node}
        print(f"wrote {write_result('telemetry_cost', figures, raw, emulated=False)}")
    return 1 if wrong else 0


# -- training --------------------------------------------------------------------------------------------------------


def the_plan() -> Plan:
    """An even cut in two: many short actions and messages, which is what counting costs most for."""
    cuts = (0, 1 + MODEL.layers // 2, MODEL.layers + 2)
    return pipeline(cpu_cluster((("core", 1.0, 2),)), MODEL, SEQUENCE, cuts, ROWS, MICRO_BATCHES)


def throughput(folder: Path, pairs: int) -> tuple[list[Pair], dict[str, Any], list[str]]:
    """Pairs of training with telemetry ("ours") and without ("theirs"), what was scraped, and what is wrong."""
    plan = the_plan()
    training = Training(workload=plan.workload, tokens_file=text_of(folder))
    telemetry = folder / "telemetry"
    with Ours(plan, training, telemetry=telemetry) as counting, Ours(plan, training) as plain:
        nodes = used_nodes(plan.cluster.devices())
        with an_agent(telemetry, nodes) as (address, _), scraping(address) as scraped:
            found = alternate(counting, {"plain": plain}, pairs=pairs, steps=STEPS, warmup=WARM_UP)["plain"]
        wrong = list(_uncounted(counting, plan, telemetry, WARM_UP + pairs * STEPS))
    wrong += list(_unfair(found, scraped))
    return found, {"scrapes": len(scraped)}, wrong


def _uncounted(engine: Ours, plan: Plan, telemetry: Path, steps: int) -> Iterator[str]:
    """Whether the counters hold all that the workers recorded."""
    devices = plan.cluster.devices()
    for device, records in zip(devices, engine.crew.call("records"), strict=True):
        file = CountersFile(telemetry / COUNTERS / f"{device.name.replace('/', '-')}.bin")
        numbers = dict(zip(FIELDS, file.read(), strict=False))
        file.close()
        if numbers["steps"] != steps:
            yield f"{device.name}: {numbers['steps']:.0f} steps counted, {steps} trained"
        ends = [records["end"][records["step"] == step].max() for step in np.unique(records["step"])]
        counted = sum(numbers[name] for name in FIELDS if name.startswith("seconds."))
        if abs(counted / ends[-1] - 1) > 0.01:
            yield f"{device.name}: {counted:.3f} s counted, the timeline has {ends[-1]:.3f} s"


def _unfair(pairs: list[Pair], scraped: list[bytes]) -> Iterator[str]:
    if (differs := loss_differs(pairs)) > LOSS_DIFFERS:
        yield f"losses differ by {differs:.2g}"
    if (idle := idle_ratio(pairs)) > IDLE_RATIO:
        yield f"the waiting side took {idle:.1%} of the CPU time"
    seconds = sum(pair.ours.seconds for pair in pairs)
    if len(scraped) < seconds / (2 * SCRAPE_EVERY_SECONDS):
        yield f"{len(scraped)} scrapes in {seconds:.0f} s of counted training"
    if len(set(scraped)) < 2:
        yield "no scrape shows that anything was counted"


@contextmanager
def scraping(address: str) -> Iterator[list[bytes]]:
    """Scrape every second, as long as the context lasts."""
    found: list[bytes] = []
    ends = threading.Event()

    def work() -> None:
        while not ends.wait(SCRAPE_EVERY_SECONDS):
            found.append(scrape(address))

    thread = threading.Thread(target=work, name="scraping")
    thread.start()
    try:
        yield found
    finally:
        ends.set()
        thread.join()


# -- a node of eight devices -----------------------------------------------------------------------------------------


def a_node(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Time scrapes of an agent that serves eight devices with all they can have, and read its memory."""
    devices = [_device(index) for index in range(NODE_DEVICES)]
    write_nodes(folder, {"g/0": {"run": "bench", "node": "g/0", "devices": devices}})
    for device in devices:
        file = CountersFile(folder / COUNTERS / device["file"], write=True)
        file.write(array("d", [float(n) + 1.5 for n in range(size_of(len(device["links"])) - 2)]))
        file.close()
    with an_agent(folder, ["g/0"]) as (address, process):
        for _ in range(10):
            text = scrape(address)
        seconds = [_timed(address) for _ in range(SCRAPES)]
        status = Path(f"/proc/{process}/status").read_text()
    (resident,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    names = {name for name, entry in METRICS.items() if entry.scope == Scope.DEVICE}
    series = sum(line.partition(b"{")[0].decode() in names for line in text.splitlines())
    wrong = []
    if series < MIN_SERIES * NODE_DEVICES:
        wrong.append(f"a scrape returned {series} series of {NODE_DEVICES} devices")
    return {
        "scrape_seconds": statistics.median(seconds),
        "agent_mib": resident / 1024,
        "series": series,
        "scrapes": seconds,
    }, wrong


def _device(index: int) -> dict[str, Any]:
    """A device of a node with a link of each kind: inside, to its group, to two others."""
    labels = {
        "device": str(index),
        "device_type": "fast",
        "vendor": "cpu",
        "pipeline": "0",
        "stage": str(index),
    }
    links = [
        {
            "link": link,
            "transport": "native",
            "src_type": "fast",
            "dst_type": "fast",
            "capacity_bytes_per_second": 1e9,
        }
        for link in ("intra g", "inter g", "h-g", "i-g")
    ]
    constants = {
        "hethub_device_memory_limit_bytes": 8e10,
        "hethub_device_predicted_memory_bytes": 7e10,
        "hethub_device_peak_flops_per_second": 3e14,
    }
    return {
        "labels": labels,
        "rank": index,
        "emulated": True,
        "file": f"g-0-{index}.bin",
        "constants": constants,
        "links": links,
    }


@contextmanager
def an_agent(folder: Path, nodes: list[str]) -> Iterator[tuple[str, int]]:
    """An agent as a run starts it: its address and its process."""
    process = start_agent(folder, nodes, "bench", "127.0.0.1")
    try:
        end = time.monotonic() + _START_SECONDS
        while "bench" not in agent_addresses(folder):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the agent does not start")
            time.sleep(0.05)
        yield agent_addresses(folder)["bench"], process.pid
    finally:
        process.terminate()
        process.wait()


def scrape(address: str) -> bytes:
    """What Prometheus gets."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return bytes(answer.read())


def _timed(address: str) -> float:
    begin = time.perf_counter()
    scrape(address)
    return time.perf_counter() - begin


if __name__ == "__main__":
    sys.exit(main())
