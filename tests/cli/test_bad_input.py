"""Bad input: one clear line with file, line and key, exit code 2 (3 where nothing fits), nothing written."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hethub.data.token_file import build_token_file
from hethub.data.tokenizers import ByteTokenizer
from tests.launch.small_job import edit, hethub, listing, write_job


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a good job."""
    write_job(tmp_path)
    return tmp_path


def refused(capsys, folder: Path, *arguments: object, code: int = 2) -> str:
    """Run a command that must fail, write nothing and say one line; returns the line without its `hethub: `."""
    before = listing(folder)
    result = hethub(capsys, folder, *arguments)
    assert result.exit_code == code, result.err
    assert listing(folder) == before
    assert result.out == ""
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("hethub: "), result.err
    return lines[0].removeprefix("hethub: ")


BAD_CLUSTERS = {
    "an unknown key": (
        [("name: two-speeds", "name: two-speeds\nnode_groop: []")],
        r"cluster.yaml:2:1 node_groop: unknown key.*node_groups",
    ),
    "an unknown device type": (
        [("device_type: slow", "device_type: slwo")],
        r"cluster.yaml:8:\d+ node_groups\[1\].device_type: .*slwo.*slow",
    ),
    "a catalog device that there is not": (
        [("fast: {vendor: cpu", "fast: {catalog: A1000, vendor: cpu")],
        r"cluster.yaml:3:\d+ device_types.fast.catalog: .*A1000.*A100",
    ),
    "an unknown device to leave out": (
        [("links:", "exclude: [b/0/7]\nlinks:")],
        r"cluster.yaml:10:\d+ exclude\[0\]: .*b/0/7",
    ),
    "zero devices in a node": (
        [("device_type: fast, nodes: 1, devices_per_node: 1", "device_type: fast, nodes: 1, devices_per_node: 0")],
        r"cluster.yaml:6:\d+ node_groups\[0\].devices_per_node: 0 is less than 1",
    ),
    "all devices left out": (
        [("links:", "exclude: [a/0/0, b/0/0]\nlinks:")],
        r"cluster.yaml:\d+:\d+ \S+: .*device",
    ),
    "groups without a way between them": (
        [("links:\n  - {between: [desk, shelf], bandwidth_mb_s: 20, latency_us: 100, transport: host-staged}\n", "")],
        r"cluster.yaml:\d+:\d+ .*(desk.*shelf|a.*b)",
    ),
    "text that is not YAML": (
        [("links:", "links: [")],
        r"cluster.yaml:\d+:\d+",
    ),
    "a model file that is not there": (
        [("model: config.json", "model: confog.json")],
        r"cluster.yaml:12:\d+ workload.model: .*confog.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", ["plan", "launch"])
@pytest.mark.parametrize("name", BAD_CLUSTERS)
def test_a_bad_cluster_file_is_refused_at_its_line(capsys, folder, name, command):
    changes, expected = BAD_CLUSTERS[name]
    edit(folder / "cluster.yaml", *changes)
    line = refused(capsys, folder, command, "cluster.yaml" if command == "plan" else "job.yaml")
    assert re.search(expected, line), line


BAD_JOBS = {
    "an unknown key": (("steps: 3", "steps: 3\nstep: 4"), r"job.yaml:5:1 step: unknown key.*steps"),
    "a missing data file": (("text.txt", "texts.txt"), r"job.yaml:3:\d+ data.files\[0\]: .*texts.txt"),
    "a missing plan file": (("plan: auto", "plan: plan.yaml"), r"job.yaml:2:\d+ plan: .*plan.yaml"),
    "a missing cluster file": (("cluster.yaml", "clutser.yaml"), r"job.yaml:1:\d+ cluster: .*clutser.yaml"),
    "no steps": (("steps: 3", "steps: 0"), r"job.yaml:4:\d+ steps: 0 is less than 1"),
    "too few held-out rows": (("rows: 16", "rows: 1000"), r"job.yaml evaluate.rows: 1000 rows .*has \d+"),
    "an output that is a file": (("output: run", "output: text.txt"), r"text.txt: output is a file"),
    "an output around the job itself": (("output: run", "output: ."), r": output "),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_a_bad_job_file_is_refused(capsys, folder, name):
    change, expected = BAD_JOBS[name]
    edit(folder / "job.yaml", change)
    line = refused(capsys, folder, "launch", "job.yaml")
    assert re.search(expected, line), line


def test_text_too_short_for_one_sequence_is_refused(capsys, folder):
    (folder / "text.txt").write_text("short")
    assert "job.yaml data.files: the training part has" in refused(capsys, folder, "launch", "job.yaml")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(capsys, folder):
    edit(folder / "config.json", ('"vocab_size": 256', '"vocab_size": 200'))
    assert "256 tokens, the model's vocab_size is 200" in refused(capsys, folder, "launch", "job.yaml")


def test_a_damaged_token_file_is_refused(capsys, folder):
    file = folder / "text.tokens"
    build_token_file([folder / "text.txt"], ByteTokenizer(), file)
    edit(folder / "job.yaml", ("text.txt", "text.tokens"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "text.tokens: a damaged token file" in refused(capsys, folder, "launch", "job.yaml")


def test_every_problem_of_a_file_has_a_line(capsys, folder):
    edit(folder / "job.yaml", ("steps: 3", "steps: 0"), ("seed: 1", "sede: 1"))
    result = hethub(capsys, folder, "launch", "job.yaml")
    assert result.exit_code == 2
    starts = [line.split(" ")[1] for line in result.err.splitlines() if line.startswith("hethub: ")]
    assert [start.rsplit("/", 1)[-1].split(":")[:2] for start in starts] == [
        ["job.yaml", "4"],
        ["job.yaml", "5"],
    ]


# -- plan files ----------------------------------------------------------------------------------------------


@pytest.fixture
def planned(capsys, folder: Path) -> Path:
    """A folder with a good job that names a good plan file: 5 layers in 2 stages, 1 row each time."""
    assert hethub(capsys, folder, "plan", "cluster.yaml").exit_code == 0
    edit(folder / "job.yaml", ("plan: auto", "plan: plan.yaml"))
    return folder


def changed(text: str, pattern: str, change) -> str:
    """`text` with the last match of a pattern's group 1 changed."""
    found = list(re.finditer(pattern, text))[-1]
    return text[: found.start(1)] + str(change(int(found[1]))) + text[found.end(1) :]


BAD_PLANS = {
    "rows that do not add up to the global batch": (
        r"micro_batches: (\d+)", lambda n: n + 1, r"plan.yaml:\d+:\d+ .*(global_batch|global batch|rows)",
    ),
    "a layer left out": (
        r"layers: \[0, (\d+)\]", lambda n: n - 1, r"plan.yaml:\d+:\d+ pipelines\[0\]\.stages\S*: .*layer",
    ),
    "a row left out": (
        r"micro_batch_rows: (\d+)", lambda n: n + 1, r"plan.yaml:\d+:\d+ pipelines.*row",
    ),
    "a share left out": (
        r"ffn: (\d+)", lambda n: n - 1, r"plan.yaml:\d+:\d+ pipelines\[0\]\.stages\[\d\]\.replicas\S*: ffn adds up to 23",  # noqa: E501
    ),
    "a device that there is not": (
        r"device: b/0/(\d+)", lambda n: 7, r"plan.yaml:\d+:\d+ pipelines\S*device: b/0/7: not in the cluster",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PLANS)
def test_an_edited_plan_is_refused_at_its_line(capsys, planned, name):
    pattern, change, expected = BAD_PLANS[name]
    plan = planned / "plan.yaml"
    plan.write_text(changed(plan.read_text(), pattern, change))
    before = listing(planned)
    result = hethub(capsys, planned, "launch", "job.yaml")
    assert (result.exit_code, result.out) == (2, "")
    assert listing(planned) == before
    lines = result.err.splitlines()
    assert lines and all(line.startswith("hethub: ") for line in lines)
    assert any(re.search(expected, line) for line in lines), result.err


def test_a_plan_of_another_cluster_is_refused_with_what_differs(capsys, planned):
    edit(planned / "cluster.yaml", ("peak_gflops: {fp32: 0.5}", "peak_gflops: {fp32: 0.6}"))
    line = refused(capsys, planned, "launch", "job.yaml")
    assert re.search(r"plan.yaml:\d+:\d+ cluster: .*cluster.yaml: device type slow: peak_flops", line), line


def test_a_plan_of_another_workload_is_refused(capsys, planned):
    edit(planned / "cluster.yaml", ("sequence_length: 16", "sequence_length: 8"))
    assert "its workload is another one" in refused(capsys, planned, "launch", "job.yaml")


# -- where to write ------------------------------------------------------------------------------------------


def test_an_output_with_foreign_files_is_refused(capsys, folder):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("years of work")
    line = refused(capsys, folder, "launch", "job.yaml")
    assert "output is in use (it holds files that no run wrote)" in line


@pytest.fixture
def running(folder: Path) -> Iterator[Path]:
    """A folder whose run another process holds."""
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with (run / "run.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield folder


def test_the_output_of_a_running_job_is_refused(capsys, running):
    assert "output is in use by a running job" in refused(capsys, running, "launch", "job.yaml")


def test_an_output_that_holds_what_the_job_reads_is_refused(capsys, folder):
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    os.replace(folder / "text.txt", folder / "run" / "text.txt")
    edit(folder / "job.yaml", ("text.txt", "run/text.txt"))
    assert "text.txt, which the job reads" in refused(capsys, folder, "launch", "job.yaml")


def test_a_plan_is_not_written_into_a_folder_that_is_not_there(capsys, folder):
    line = refused(capsys, folder, "plan", "cluster.yaml", "--output", "no/plan.yaml")
    assert "no/plan.yaml: its folder does not exist" in line


# -- a model that fits nowhere -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["plan", "launch"])
def test_a_model_that_fits_nowhere_exits_with_3_and_says_what_would_fit(capsys, folder, command):
    edit(folder / "cluster.yaml", ("memory_mib: 0.25", "memory_mib: 0.12"))
    file = "cluster.yaml" if command == "plan" else "job.yaml"
    line = refused(capsys, folder, command, file, code=3)
    assert re.search(r"needs [\d.]+ [KM]iB and has [\d.]+ [KM]iB, [\d.]+ [KM]iB short", line), line
    assert re.search(r"\d+ more (fast|slow) \(\d+ more nodes? in group [ab]\) would fit", line), line


# -- the process ---------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback_and_keeps_the_exit_code(capsys, folder):
    edit(folder / "job.yaml", ("steps: 3", "steps: 0"))
    result = hethub(capsys, folder, "--debug", "launch", "job.yaml")
    assert result.exit_code == 2
    assert "Traceback" in result.err and "steps: 0 is less than 1" in result.err


def test_the_installed_script_and_the_module_end_alike(folder):
    edit(folder / "cluster.yaml", ("name: two-speeds", "name: two-speeds\nlinsk: []"))
    script = str(Path(sys.executable).with_name("hethub"))
    for command in ([script], [sys.executable, "-m", "hethub"]):
        done = subprocess.run(
            [*command, "plan", "cluster.yaml"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("hethub: cluster.yaml:2:1 linsk: unknown key")
