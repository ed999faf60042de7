"""The agent of a machine: what it serves, what it costs, and that it goes when its parent goes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from array import array
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from hethub.telemetry.agent import Agent
from hethub.telemetry.counters import FIELDS, CountersFile, create_counters, size_of
from hethub.telemetry.describe import write_nodes
from hethub.telemetry.families import registry_of
from hethub.telemetry.folder import agent_addresses, agent_file, start_agent
from hethub.telemetry.metrics import METRICS, SERIES_PER_DEVICE, Scope
from hethub.telemetry.sensors import Adapter, Reading, Sensors
from tests.processes import alive, until
from tests.telemetry.made import count, described_device, numbers_of, write_folder

DEVICE_METRICS = {name for name, entry in METRICS.items() if entry.scope == Scope.DEVICE}


def sensed(watts: float = 300.0) -> Sensors:
    """Sensors that have read every figure of eight devices."""
    reading = Reading(source="nvml", watts=watts, celsius=60.0, joules=1e6, uuid="GPU-7")
    sensors = Sensors({"nvidia": Adapter("nvml", lambda: dict.fromkeys(range(8), reading))})
    sensors.read("nvidia")
    return sensors


def test_ten_thousand_devices_stay_within_the_budget(tmp_path: Path) -> None:
    """With every sensor that there is, so that no device could have more."""
    nodes = {
        f"g/{node}": [
            described_device(f"g/{node}", index, vendor="nvidia", emulated=False) for index in range(8)
        ]
        for node in range(1250)
    }
    write_folder(tmp_path, nodes)
    sensors = sensed()
    sensors.of("nvidia", 0, emulated=False)
    total = 0
    worst = 0
    for node in nodes:
        series = Agent(tmp_path, [node], sensors).series()
        of_devices = sum(series.count(name) for name in DEVICE_METRICS)
        worst = max(worst, of_devices // 8)
        total += len(series)
    assert worst <= SERIES_PER_DEVICE
    assert worst >= 30  # the count is of something
    assert total <= 10_000 * SERIES_PER_DEVICE


def test_a_scrape_shows_the_counters_with_their_labels(tmp_path: Path) -> None:
    device = described_device("a/0", 3, links=0)
    write_folder(tmp_path, {"a/0": [device]})
    count(tmp_path, device, numbers_of(seconds__forward=12.5, flops=7e9, heartbeat_unix_seconds=1e9))
    text = generate_latest(registry_of(Agent(tmp_path, ["a/0"]).families)).decode()
    labels = 'device="3",device_type="fast",node="a/0",pipeline="0",run="run",stage="0",vendor="cpu"'
    found = re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    by_name = {(name, ",".join(sorted(inside.split(",")))): float(value) for name, inside, value in found}
    assert by_name["hethub_device_flops_total", labels] == 7e9
    forward = ",".join(sorted(('activity="busy"', 'kind="forward"', *labels.split(","))))
    assert by_name["hethub_device_seconds_total", forward] == 12.5
    assert "_created" not in text


def test_devices_that_leave_are_dropped_and_counters_of_the_others_go_on(tmp_path: Path) -> None:
    devices = [described_device("a/0", index) for index in range(2)]
    write_folder(tmp_path, {"a/0": devices, "b/0": [described_device("b/0", 0)]})
    agent = Agent(tmp_path, ["a/0", "b/0"])
    assert agent.series().count("hethub_device_flops_total") == 3
    before = agent.series().total("hethub_device_flops_total")
    write_nodes(tmp_path, {"a/0": {"run": "run", "node": "a/0", "devices": devices[:1]}})
    after = agent.series()
    assert after.count("hethub_device_flops_total") == 1
    assert after.count("hethub_node_devices") == 1
    assert after.total("hethub_device_flops_total") == before / 3


def test_a_sensor_that_tells_of_energy_takes_the_estimates_place(tmp_path: Path) -> None:
    device = described_device("a/0", 0, vendor="nvidia", emulated=False)
    write_folder(tmp_path, {"a/0": [device]})
    sensors = sensed()
    series = Agent(tmp_path, ["a/0"], sensors).series()
    assert series.count("hethub_device_energy_joules_total") == 1
    assert series.total("hethub_device_energy_joules_total") == 1e6
    assert series.total("hethub_device_power_watts") == 300.0
    emulated = described_device("a/0", 0, vendor="nvidia", emulated=True)
    write_folder(tmp_path, {"a/0": [emulated]})
    series = Agent(tmp_path, ["a/0"], sensors).series()
    assert series.count("hethub_device_power_watts") == 0
    assert series.total("hethub_device_energy_joules_total") == FIELDS.index("energy_joules") + 1


def test_a_reader_sees_a_whole_step_or_none(tmp_path: Path) -> None:
    """Seen to fail without the version: a copy of 500 numbers is no single act."""
    file = tmp_path / "a.bin"
    links = 200
    create_counters(file, links)
    size = size_of(links) - 2
    writer, reader = CountersFile(file, write=True), CountersFile(file)
    ends = threading.Event()

    def write() -> None:
        turn = 0.0
        while not ends.is_set():
            turn += 1.0
            writer.write(array("d", [turn]) * size)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3000):
            assert len(set(reader.read())) == 1
    finally:
        ends.set()
        thread.join()


def test_a_writer_that_died_in_the_act_does_not_hold_up_readers(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    create_counters(file, 0)
    writer, reader = CountersFile(file, write=True), CountersFile(file)
    writer.write(array("d", [5.0]) * len(FIELDS))
    assert set(reader.read()) == {5.0}
    writer._numbers[1] += 1
    assert set(reader.read()) == {5.0}
    again = CountersFile(file, write=True)
    again.write(array("d", [6.0]) * len(FIELDS))
    assert set(reader.read()) == {6.0}


def test_a_plan_with_other_links_keeps_the_devices_own_counters(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    create_counters(file, 2)
    writer = CountersFile(file, write=True)
    writer.write(array("d", [5.0]) * (size_of(2) - 2))
    create_counters(file, 1)
    numbers = CountersFile(file).read()
    assert set(numbers[: len(FIELDS)]) == {5.0}
    assert set(numbers[len(FIELDS) :]) == {0.0}


# -- the process -----------------------------------------------------------------------------------------------------

PARENT = """
import sys, time
from pathlib import Path
from hethub.telemetry.folder import start_agent
start_agent(Path(sys.argv[1]), ["a/0"], "here", "127.0.0.1")
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    write_folder(tmp_path, {"a/0": [described_device("a/0", 0)]})
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)])
    try:
        until(lambda: agent_file(tmp_path, "here").exists(), 60, "the agent listens")
        process = json.loads(agent_file(tmp_path, "here").read_text())["process"]
        address = agent_addresses(tmp_path)["here"]
        assert address.startswith("127.0.0.1:")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            assert b"hethub_device_seconds_total" in answer.read()
        assert alive(process)
        os.kill(parent.pid, how)
        parent.wait()
        until(lambda: not alive(process), 20, "the agent ends")
        assert not agent_file(tmp_path, "here").exists()
    finally:
        parent.kill()
        parent.wait()


def test_an_old_agent_leaves_the_address_of_a_new_one_of_its_name(tmp_path: Path) -> None:
    """A host that hung is replaced, and comes back. Seen to fail: its agent took the new one's file with it."""
    write_folder(tmp_path, {"a/0": [described_device("a/0", 0)]})
    file = agent_file(tmp_path, "here")
    agents: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(2):
            agents.append(start_agent(tmp_path, ["a/0"], "here", "127.0.0.1"))
            until(lambda: told(file) == agents[-1].pid, 60, "the agent listens")
        old, new = agents
        old.terminate()
        assert old.wait(20) == 0
        assert told(file) == new.pid
        new.terminate()
        assert new.wait(20) == 0
        assert not file.exists()
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def told(file: Path) -> int | None:
    """The process that an agent's file names; None where there is none."""
    return int(json.loads(file.read_text())["process"]) if file.exists() else None


def test_it_loads_nothing_heavy() -> None:
    """Its memory is what a node pays for it."""
    heavy = ("torch", "ray", "numpy", "numba", "pydantic", "yaml")
    code = (
        f"import sys, hethub.telemetry.agent as a\nprint([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_address_that_is_not_this_machines_ends_it_with_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "hethub.telemetry.agent", "--folder", str(tmp_path), "--nodes", "a/0"),
            *("--name", "here", "--listen", "192.0.2.1", "--parent", str(os.getpid())),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 4
    assert re.fullmatch(r"192\.0\.2\.1: cannot listen there \(.*\)\. Set telemetry\.listen\.\n", done.stderr)
