"""The files under docker/: linted, images pinned, nothing open to the network, a configuration that works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.small_job import edit, launched, write_job
from tests.processes import until
from tests.telemetry.prometheus import prometheus_running
from tests.telemetry.promql import BOARDS, ROOT, needs_promtool, promtool

DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
BIN = Path(sys.executable).parent
HERE = re.compile(r"127\.0\.0\.1(:\d+)?")


@pytest.fixture
def services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


def lint(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def schema_check(path):
    return lint(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def test_the_compose_file_is_one(tmp_path):
    answer = schema_check(COMPOSE)
    assert answer.returncode == 0, answer.stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("network_mode:", "netwrok_mode:"))
    assert schema_check(wrong).returncode == 1


def test_the_image_files_are_linted(tmp_path):
    answer = lint(BIN / "hadolint", *DOCKER.glob("Dockerfile*"))
    assert answer.returncode == 0 and answer.stdout == ""
    wrong = tmp_path / "Dockerfile"
    wrong.write_text((DOCKER / "Dockerfile.cpu").read_text().replace(":3.11.13-slim-bookworm", ""))
    assert lint(BIN / "hadolint", wrong).returncode == 1


def test_images_are_pinned(services):
    images = [service["image"] for service in services.values() if "build" not in service]
    assert len(images) == 2
    assert all(re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image) for image in images)
    bases = re.findall(r"^FROM (\S+)", (DOCKER / "Dockerfile.cpu").read_text(), re.MULTILINE)
    assert bases and all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+", base) for base in bases)


def test_nothing_listens_beyond_this_machine(services):
    assert all(service["network_mode"] == "host" and "ports" not in service for service in services.values())
    options = [option for option in services["prometheus"]["command"] if "listen-address" in option]
    assert len(options) == 1 and HERE.search(options[0])
    grafana = services["grafana"]["environment"]
    assert HERE.fullmatch(grafana["GF_SERVER_HTTP_ADDR"])
    # Who reaches it may look; that is all.
    assert (
        grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "true" and grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    )
    assert grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true" and grafana["GF_AUTH_BASIC_ENABLED"] == "false"


def test_no_secret_stands_in_the_files():
    for path in DOCKER.rglob("*"):
        if path.is_file():
            assert not re.search(r"(?i)password|secret|token[_-]|api[_-]?key", path.read_text()), path


def test_what_is_mounted_is_there(services):
    volumes = [volume for service in services.values() for volume in service["volumes"]]
    binds = [volume for volume in volumes if volume["type"] == "bind"]
    assert binds and all((DOCKER / volume["source"]).is_dir() and volume["read_only"] for volume in binds)
    named = {volume["source"] for volume in volumes if volume["type"] == "volume"}
    assert named == set(yaml.safe_load(COMPOSE.read_text())["volumes"])


def test_grafana_finds_boards_and_data(services):
    targets = {volume["target"]: volume["source"] for volume in services["grafana"]["volumes"]}
    provisioning = DOCKER / targets["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "hethub.yaml").read_text())["providers"]
    assert sorted((DOCKER / targets[provider["options"]["path"]]).glob("*.json")) == BOARDS
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    address = source["url"].removeprefix("http://")
    assert f"--web.listen-address={address}" in services["prometheus"]["command"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).name in {path.name for path in BOARDS}
    interval = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == interval["scrape_interval"]


def test_the_demo_runs_a_job_of_the_image(services):
    demo = services["demo"]
    assert demo["profiles"] == ["demo"]
    copied = re.findall(r"^COPY (.+) \S+$", (DOCKER / "Dockerfile.cpu").read_text(), re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    assert all((ROOT / name).exists() for name in sources)
    assert {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    } == sources
    job = ROOT / demo["command"][1]
    assert demo["command"][0] == "launch" and job.is_file() and job.parent.name in sources
    # It is written where the volume is, and found there.
    (volume,) = demo["volumes"]
    output = (Path("/opt/hethub") / job.parent.name / yaml.safe_load(job.read_text())["output"]).as_posix()
    assert os.path.normpath(output).startswith(volume["target"] + "/")


@needs_promtool
def test_prometheus_takes_its_configuration(tmp_path):
    answer = promtool("check", "config", DOCKER / "prometheus" / "prometheus.yml", folder=tmp_path)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_shipped_configuration_finds_a_run_of_the_checkout(tmp_path):
    """As in the container: the checkout somewhere, a run under its runs/."""
    shutil.copytree(DOCKER, tmp_path / "docker")
    job = tmp_path / "jobs"
    job.mkdir()
    write_job(job)
    edit(job / "job.yaml", ("output: run", "output: ../runs/first"), ("steps: 3", "steps: 100000"))
    config = tmp_path / "docker" / "prometheus" / "prometheus.yml"
    with prometheus_running(tmp_path / "prometheus", config) as server, launched(job):
        until(
            lambda: len(server.query('up{job="hethub"} == 1')) == 2,
            120,
            "the driver and an agent are scraped",
        )
        instances = {sample.labels["instance"] for sample in server.query("up")}
        assert "first/driver" in instances and all(name.startswith("first/") for name in instances)
        until(lambda: bool(server.query('hethub_run_info{run="first"}')), 60, "the run is known")
        assert server.query('hethub_device_info{run="first"}')


def test_boards_are_plain_json():
    assert all(json.loads(path.read_text())["schemaVersion"] > 30 for path in BOARDS)
