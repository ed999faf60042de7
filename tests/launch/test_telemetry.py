"""The driver's part of telemetry, without workers: what it serves, where, and that nothing of it stays."""

from __future__ import annotations

import json
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from hethub.errors import InputError, MachineError
from hethub.files import write_json
from hethub.launch.compiled import choose_plans, compile_plan
from hethub.launch.telemetry import Telemetry
from hethub.specs.job import Job, load_job
from hethub.telemetry import folder
from hethub.telemetry.describe import used_nodes
from hethub.telemetry.folder import start_agent
from tests.launch.small_job import edit, listing, write_job
from tests.telemetry.prometheus import until


@pytest.fixture
def job(tmp_path: Path) -> Job:
    write_job(tmp_path)
    (tmp_path / "run" / "logs").mkdir(parents=True)
    return load_job(tmp_path / "job.yaml")


def unexpected(line: str) -> None:
    raise AssertionError(line)


def scrape(target: str) -> str:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def targets(file: Path) -> dict[str, str]:
    return {entry["labels"]["instance"]: entry["targets"][0] for entry in json.loads(file.read_text())}


def test_it_serves_on_this_machine_only_and_leaves_what_was_counted(job: Job) -> None:
    before = listing(job.output.parent)
    compiled = compile_plan(choose_plans(job)[0])
    with Telemetry(job, job.output, unexpected) as telemetry:
        agent = start_agent(telemetry.folder, used_nodes(job.cluster.devices()), "local", "127.0.0.1")
        meter = telemetry.begin(compiled, 2.0, 1, job)
        assert meter is not None

        def both() -> bool:
            telemetry.tick()
            return len(targets(job.output / "telemetry" / "targets.json")) == 2

        until(both, 60, "the agent listens")
        found = targets(job.output / "telemetry" / "targets.json")
        assert found == targets(job.output.parent / ".targets" / "run.json")
        assert set(found) == {"run/driver", "run/local"}
        assert all(target.startswith("127.0.0.1:") for target in found.values())
        assert 'hethub_time_scale_ratio{run="run"} 2.0' in scrape(found["run/driver"])
        counted = scrape(found["run/local"])
        assert counted.count("hethub_device_flops_total{") == len(compiled.program.layout.used)
        agent.terminate()
        assert agent.wait(20) == 0
        telemetry.tick()
        assert set(targets(job.output / "telemetry" / "targets.json")) == {"run/driver"}
    with pytest.raises(OSError, match="refused"):
        scrape(found["run/driver"])
    after = listing(job.output.parent)
    kept = {name for name in after if name not in before}
    assert kept == {"run/telemetry" + end for end in ("", "/counters", "/nodes")} | {
        f"run/telemetry/{name}"
        for name in ("counters/a-0-0.bin", "counters/b-0-0.bin", "nodes/a-0.json", "nodes/b-0.json")
    }
    assert {name: after[name] for name in before} == before


def test_a_job_can_do_without(job: Job) -> None:
    edit(job.path, ("output: run", "output: run\ntelemetry: {enabled: false}"))
    off = load_job(job.path)
    assert off.telemetry_listen is None
    before = listing(off.output)
    with Telemetry(off, off.output, unexpected) as telemetry:
        assert telemetry.begin(compile_plan(choose_plans(off)[0]), 1.0, 1, off) is None
        telemetry.steps([(0, 1.0, 1.0)])
        telemetry.failed("worker", restarts=True)
        telemetry.tick()
        assert listing(off.output) == before


def test_an_agent_that_does_not_start_is_told_and_training_goes_on(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # which takes no -m
    with Telemetry(job, job.output, said.append) as telemetry:
        start_agent(telemetry.folder, ["a/0"], "local", "127.0.0.1").wait(20)

        def told() -> bool:
            telemetry.tick()
            return bool(said)

        until(told, 20, "the agent's words")
        telemetry.tick()
    assert len(said) == 1
    assert said[0].startswith("warning: agent local: ")


@pytest.mark.parametrize("mended", [True, False])
def test_targets_that_cannot_be_written_are_told_once_and_tried_again(job: Job, mended: bool) -> None:
    """Seen to catch: the error as a traceback, at the start, while training and at the end."""
    shared, own = job.output.parent / ".targets", job.output / "telemetry" / "targets.json"
    shared.write_text("no folder")  # so that nobody, root neither, can write into it
    said: list[str] = []
    with Telemetry(job, job.output, said.append) as telemetry:
        written = own.stat()
        telemetry.tick()
        assert len(said) == 1
        assert said[0].startswith(f"warning: {shared / 'run.json'}: cannot be written (")
        assert own.stat().st_ino == written.st_ino and own.stat().st_mtime_ns == written.st_mtime_ns
        if mended:
            shared.unlink()
            telemetry.tick()
            assert targets(shared / "run.json") == targets(own)
            assert len(said) == 1
    assert shared.exists() == (not mended)
    assert not own.exists()


def test_another_run_that_ends_meanwhile_takes_nothing_away(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to catch: FileNotFoundError where the other removed the folder of both before our file was in it."""
    shared, real = job.output.parent / ".targets", write_json
    removed: list[Path] = []

    def late(file: Path, content: object) -> None:
        if file.parent == shared and not removed:
            shared.rmdir()
            removed.append(shared)
        real(file, content)

    monkeypatch.setattr(folder, "write_json", late)
    with Telemetry(job, job.output, unexpected):
        assert removed and set(targets(shared / "run.json")) == {"run/driver"}


def test_an_address_of_another_machine_is_told_in_one_line(job: Job) -> None:
    with (
        pytest.raises(MachineError, match=r"job\.yaml: telemetry\.listen: cannot listen on 192\.0\.2\.1 \("),
        Telemetry(replace(job, telemetry_listen="192.0.2.1"), job.output, unexpected),
    ):
        pass


def test_the_key_is_checked(job: Job) -> None:
    edit(job.path, ("output: run", "output: run\ntelemetry: {listen: ''}"))
    with pytest.raises(InputError, match=r"telemetry"):
        load_job(job.path)


def test_nothing_secret_is_served(job: Job) -> None:
    """Nor paths, nor the lease's token, which makes a driver the run's."""
    (job.output / "lease.json").write_text(json.dumps({"token": "5ec3e7"}))
    compiled = compile_plan(choose_plans(job)[0])
    with Telemetry(job, job.output, unexpected) as telemetry:
        telemetry.begin(compiled, 1.0, 1, job)
        text = scrape(targets(job.output / "telemetry" / "targets.json")["run/driver"])
    assert "5ec3e7" not in text
    assert str(job.path.parent) not in text
