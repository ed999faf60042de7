"""The job file: paths relative to it, globs found, refusals with line and key."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from hethub.errors import InputError
from hethub.specs.base import json_schema
from hethub.specs.job import JobSpec, load_job

CLUSTER = """\
name: two
node_groups:
  - {name: a, device_type: T4, nodes: 1, devices_per_node: 2, intra_link: pcie3, inter_link: roce-100g}
workload: {model: llama-7b, sequence_length: 128, global_batch: 8, precision: fp16}
"""
JOB = """\
cluster: clusters/two.yaml
plan: auto
data: {files: [corpus/*.txt, extra.txt], tokenizer: bytes, held_out: 0.05}
steps: 200
seed: 1
evaluate: {every: 50, rows: 64}
optimizer: {learning_rate: 3e-4, warmup_steps: 20, weight_decay: 0.1, clip_norm: 1.0}
output: runs/first
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "two.yaml").write_text(CLUSTER)
    (tmp_path / "corpus").mkdir()
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / "corpus" / name).write_text(name)
    (tmp_path / "extra.txt").write_text("more")
    return tmp_path


def load(folder, text):
    (folder / "job.yaml").write_text(text)
    return load_job(folder / "job.yaml")


def test_paths_are_relative_to_the_job_file(folder):
    job = load(folder, JOB)
    assert job.cluster_path == folder / "clusters" / "two.yaml"
    assert job.data_files == (folder / "corpus" / "a.txt", folder / "corpus" / "b.txt", folder / "extra.txt")
    assert job.output == folder / "runs" / "first"
    assert job.plan is None
    assert job.tokenizer == "bytes"
    assert job.workload.model.name == "llama-7b"
    assert (job.steps, job.seed, job.evaluate_every, job.evaluate_rows) == (200, 1, 50, 64)


def test_the_optimizer_has_the_usual_defaults(folder):
    settings = load(folder, JOB).optimizer
    assert (settings.learning_rate, settings.warmup_steps, settings.clip_norm) == (3e-4, 20, 1.0)
    assert (settings.beta1, settings.beta2, settings.epsilon) == (0.9, 0.95, 1e-8)
    assert settings.final_learning_rate_ratio == 0.1
    assert load(folder, JOB.replace("clip_norm: 1.0", "clip_norm: null")).optimizer.clip_norm is None


def test_what_a_job_leaves_out_is_off(folder):
    job = load(folder, JOB.replace("evaluate: {every: 50, rows: 64}\n", ""))
    assert (job.evaluate_every, job.evaluate_rows, job.compare_even_steps, job.ray_address) == (0, 0, 0, None)


def test_comparison_ray_and_workload_are_taken(folder):
    more = "compare: {even_steps: 20}\nray: {address: auto}\n"
    more += "workload: {model: llama-13b, sequence_length: 64, global_batch: 4, precision: fp32}\n"
    job = load(folder, JOB + more)
    assert (job.compare_even_steps, job.ray_address, job.workload.model.name) == (20, "auto", "llama-13b")


def test_text_of_pythons_library_is_found_by_its_own_prefix(folder):
    job = load(folder, JOB.replace("corpus/*.txt, extra.txt", '"stdlib:json/*.py"'))
    library = Path(sysconfig.get_path("stdlib"))
    assert library / "json" / "decoder.py" in job.data_files


def test_a_file_that_two_globs_match_is_taken_once(folder):
    job = load(folder, JOB.replace("extra.txt]", "extra.txt, '**/*.txt']"))
    assert len(job.data_files) == len(set(job.data_files)) == 3


def test_a_folder_whose_name_looks_like_a_glob_is_no_glob(folder):
    odd = folder / "[ab]"
    odd.mkdir()
    (odd / "x.txt").write_text("x")
    text = JOB.replace("clusters/two.yaml", "../clusters/two.yaml").replace(
        "corpus/*.txt, extra.txt", "'*.txt'"
    )
    assert load(odd, text).data_files == (odd / "x.txt",)


REFUSED = {
    "missing cluster": ("clusters/two.yaml", "none.yaml", "1", "cluster: there is no file"),
    "missing plan": ("plan: auto", "plan: none.yaml", "2", "plan: there is no file"),
    "missing data": ("extra.txt]", "none.txt]", "3", "data.files[1]: no file matches"),
    "no data": ("[corpus/*.txt, extra.txt]", "[]", "3", "data.files: has 0 entries. Give at least 1."),
    "missing tokenizer": (
        "tokenizer: bytes",
        "tokenizer: tokenizer.json",
        "3",
        "data.tokenizer: there is no file",
    ),
    "too much held out": ("held_out: 0.05", "held_out: 0.6", "3", "data.held_out: 0.6 is more than 0.5"),
    "no steps": ("steps: 200", "steps: 0", "4", "steps: 0 is less than 1. Give at least 1."),
    "unknown key": ("seed: 1", "sead: 1", "5", 'sead: unknown key. Did you mean "seed"?'),
    "nothing to evaluate": ("held_out: 0.05", "held_out: 0", "6", "evaluate: there is no held-out text"),
    "no learning rate": (
        "learning_rate: 3e-4, ",
        "",
        "7",
        "optimizer.learning_rate: required key is missing. Add it",
    ),
    "negative learning rate": ("3e-4", "-3e-4", "7", "optimizer.learning_rate: -0.0003 is not more than 0"),
    "text for a number": (
        "0.1, clip",
        "big, clip",
        "7",
        'optimizer.weight_decay: expected a number, got "big"',
    ),
    "no output": ("output: runs/first\n", "", "1", "output: required key is missing. Add it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_job_is_refused_with_its_line_and_key(folder, case):
    old, new, line, text = REFUSED[case]
    assert old in JOB
    with pytest.raises(InputError) as caught:
        load(folder, JOB.replace(old, new))
    told = [one for one in caught.value.message.splitlines() if text in one]
    assert told, caught.value.message
    assert told[0].startswith(f"{folder}/job.yaml:{line}:")


def test_a_precision_that_a_device_lacks_is_refused_at_the_jobs_own_line(folder):
    more = "workload: {model: llama-7b, sequence_length: 64, global_batch: 4, precision: bf16}\n"
    with pytest.raises(InputError, match=r"job\.yaml:9:\d+ workload\.precision: T4 has no bf16"):
        load(folder, JOB + more)


def test_a_job_without_any_workload_is_refused(folder):
    cluster = folder / "clusters" / "two.yaml"
    cluster.write_text("".join(cluster.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"job\.yaml:1:1 cluster: the cluster file has no workload"):
        load(folder, JOB)


def test_a_token_file_stands_alone(folder):
    (folder / "x.tokens").write_bytes(b"")
    assert load(folder, JOB.replace("corpus/*.txt, extra.txt", "x.tokens")).data_files == (
        folder / "x.tokens",
    )
    with pytest.raises(InputError, match=r"data\.files\[1\]: x\.tokens is a token file\. Give it alone"):
        load(folder, JOB.replace("extra.txt", "x.tokens"))


def test_a_fault_of_the_cluster_file_names_the_cluster_file(folder):
    cluster = folder / "clusters" / "two.yaml"
    cluster.write_text(CLUSTER.replace("T4", "T5"))
    with pytest.raises(InputError, match=r"two\.yaml:3:\d+ node_groups\[0\]\.device_type"):
        load(folder, JOB)


FAULT = "fault: {device: a/0/1, step: 2, action: 17, phase: after, do: kill}\n"


def test_a_job_has_no_fault_unless_it_asks_for_one(folder):
    assert load(folder, JOB).faults == ()
    assert load(folder, JOB).digest_every == 50
    assert load(folder, JOB + "history: {digest_every: 5}\n").digest_every == 5


def test_one_fault_or_a_list_is_taken(folder):
    (one,) = load(folder, JOB + FAULT).faults
    assert (one.device, one.step, one.action, one.phase, one.do) == (1, 2, 17, "after", "kill")
    assert one.place == f"{folder}/job.yaml:9:33 fault.action"
    more = "fault:\n  - {device: a/0/0, action: join, do: hang}\n"
    more += "  - {device: a/0/1, action: update, do: slow, factor: 3.5}\n"
    first, second = load(folder, JOB + more).faults
    assert (first.device, first.step, first.action, first.phase) == (0, 0, "join", "before")
    assert (second.action, second.factor) == ("update", 3.5)
    assert second.place == f"{folder}/job.yaml:11:21 fault[1].action"


WRONG_FAULTS = {
    "unknown device": ("a/0/1", "a/0/2", 'fault.device: there is no device "a/0/2". Did you mean "a/0/'),
    "step past the end": ("step: 2", "step: 200", "fault.step: 200 is past the last step of the job, 199"),
    "unknown deed": ("kill", "kil", 'fault.do: "kil" is not known here. Did you mean "kill"?'),
    "unknown phase": ("after", "later", 'fault.phase: "later" is not known here.'),
    "unknown key": ("do: kill", "do: kill, faktor: 2", 'fault.faktor: unknown key. Did you mean "factor"?'),
    "faster": ("do: kill", "do: slow, factor: 1", "fault.factor: 1 is not more than 1"),
    "join late": ("17, phase: after", "join", "fault.action: join comes once, before step 0"),
    "slow join": (
        "step: 2, action: 17, phase: after, do: kill",
        "action: join, do: nan",
        "fault.do: a worker",
    ),
    "no action": ("action: 17, ", "", "fault.action: is missing. A fault names a device and an action"),
    "no device": ("device: a/0/1, ", "", "fault.device: is missing. A fault names a device and an action"),
    "compute that is not slow": ("17, phase: after", "compute", "fault.action: compute is for do: slow"),
    "an action that lasts": ("step: 2", "step: 2, steps: 2", "fault.steps: is for action: compute"),
    "a link that dies": ("device: a/0/1", "link: intra a", "fault.link: a link can only be slow"),
    "an unknown link": (
        "device: a/0/1, step: 2, action: 17, phase: after, do: kill",
        "link: intra q, do: slow",
        'fault.link: there is no link "intra q". Did you mean "intra',
    ),
    "a real link": (
        "device: a/0/1, step: 2, action: 17, phase: after, do: kill",
        "link: intra a, do: slow",
        "fault.link: real links are as fast as they are",
    ),
}


@pytest.mark.parametrize("case", WRONG_FAULTS)
def test_a_wrong_fault_is_refused_with_its_line_and_key(folder, case):
    old, new, text = WRONG_FAULTS[case]
    assert old in FAULT
    with pytest.raises(InputError) as caught:
        load(folder, JOB + FAULT.replace(old, new))
    told = [one for one in caught.value.message.splitlines() if text in one]
    assert told, caught.value.message
    assert told[0].startswith(f"{folder}/job.yaml:9:")


def test_the_example_job_loads():
    job = load_job(Path("cluster_specs/laptop-job.yaml"))
    assert job.cluster.name == "laptop"
    assert len(job.data_files) > 50


def test_the_schema_describes_every_key():
    schema = json_schema(JobSpec)
    for part in (schema, *schema["$defs"].values()):
        for key, field in part["properties"].items():
            assert field.get("description"), key


def test_checkpoints_and_failures_have_policies(folder):
    job = load(folder, JOB)
    assert job.checkpoint is None and job.initial_weights is None
    assert (job.on_failure.restart, job.on_failure.not_a_number) == ("none", "stop")
    text = "checkpoint: {every: 20}\non_failure: {restart: replan, within_seconds: 60}\ninitial_weights: corpus\n"
    job = load(folder, JOB + text)
    assert (job.checkpoint.every, job.checkpoint.keep, job.checkpoint.notice_seconds) == (20, 2, 30)
    assert (job.on_failure.restart, job.on_failure.max_restarts) == ("replan", 3)
    assert job.initial_weights == folder / "corpus"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("checkpoint: {every: 0}", r"checkpoint\.every: 0 is less than 1"),
        ("on_failure: {restart: again}", r'on_failure\.restart: .*"again"'),
        ("on_failure: {not_a_number: roll_back}", r"on_failure\.not_a_number: roll_back needs checkpoints"),
        ("initial_weights: nowhere", r"initial_weights: there is no folder .*nowhere"),
    ],
)
def test_policies_that_cannot_be_kept_are_refused_at_their_key(folder, text, words):
    with pytest.raises(InputError, match=words):
        load(folder, JOB + text + "\n")
