"""`hethub launch` from end to end on a real Ray: a run finishes, is the reference's training, and leaves nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hethub.data.batches import Batches
from hethub.data.token_file import open_token_file
from hethub.launch.reference import ReferenceRun, train_reference
from hethub.program.check import check_plan
from hethub.specs.job import load_job
from hethub.specs.plan import load_plan
from tests.launch.small_job import Result, edit, launched, listing, write_job


@dataclass(frozen=True)
class Run:
    """A launch that has ended, as its run folder told then."""

    result: Result
    left: list[str]
    files: set[str]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    weights: dict[str, np.ndarray]
    used: int  # stages of its plan


def run(folder: Path) -> Run:
    with launched(folder, "--json") as launch:
        result = launch.end()
        left = launch.left()
    assert result.exit_code == 0, result.err
    output = folder / "run"
    plan, _ = load_plan(output / "plan.yaml")
    assert check_plan(plan) == []
    return Run(
        result=result,
        left=left,
        files=set(listing(output)),
        summary=json.loads((output / "summary.json").read_text()),
        metrics=[json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()],
        weights=load_file(output / "model.safetensors"),
        used=len(plan.pipelines[0].stages),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    write_job(folder)
    edit(folder / "job.yaml", ("output: run", "output: run\ncompare: {even_steps: 2}"))
    return folder


@pytest.fixture(scope="module")
def emulated(folder: Path) -> Run:
    """The job as it stands: emulated devices, an even run beside it."""
    return run(folder)


@pytest.fixture(scope="module")
def real(folder: Path, emulated: Run) -> Run:
    """The same job on real devices, into the folder of the finished run."""
    edit(folder / "cluster.yaml", ("emulated: {time_scale: 20}\n", ""))
    edit(folder / "job.yaml", ("compare: {even_steps: 2}", ""))
    (folder / "run" / "old").mkdir()
    return run(folder)


@pytest.fixture(scope="module")
def reference(folder: Path, emulated: Run) -> ReferenceRun:
    job = load_job(folder / "job.yaml")
    batches = Batches(
        open_token_file(next((folder / "run").glob("*.tokens"))).tokens,
        sequence_length=job.workload.sequence_length,
        global_batch=job.workload.global_batch,
        seed=job.seed,
        held_out=job.held_out,
    )
    return train_reference(
        job.workload,
        batches,
        job.optimizer,
        steps=job.steps,
        seed=job.seed,
        dtype=torch.float32,
        held_out_rows=job.evaluate_rows,
    )


def check_same_training(run: Run, reference: ReferenceRun) -> None:
    np.testing.assert_allclose([m["loss"] for m in run.metrics], reference.losses, rtol=1e-4)
    np.testing.assert_allclose([m["grad_norm"] for m in run.metrics], reference.norms, rtol=1e-4)
    np.testing.assert_allclose(run.summary["heldout_loss"], reference.held_out_loss, rtol=1e-4)
    assert run.weights.keys() == reference.weights.keys()
    for name, value in reference.weights.items():
        assert np.linalg.norm(run.weights[name] - value) <= 1e-3 * np.linalg.norm(value), name


def test_an_emulated_run_is_the_training_of_one_process(emulated: Run, reference: ReferenceRun) -> None:
    assert emulated.used == 2
    check_same_training(emulated, reference)


def test_a_run_on_real_devices_is_the_training_of_one_process(real: Run, reference: ReferenceRun) -> None:
    check_same_training(real, reference)
    assert (real.summary["emulated"], real.summary["time_scale"]) == (False, 1.0)


FILES = {"run.json", "attempts.jsonl", "plan.yaml", "predicted.npz", "measured.npz", "metrics.jsonl",
         "model.safetensors", "trace.json", "timeline.html", "summary.json",
         "logs", "logs/a-0-0.log", "logs/b-0-0.log", "history", "history/a-0-0.jsonl",
         "history/b-0-0.jsonl", "telemetry", "telemetry/nodes", "telemetry/nodes/a-0.json", "telemetry/nodes/b-0.json",
         "telemetry/counters", "telemetry/counters/a-0-0.bin", "telemetry/counters/b-0-0.bin"}  # fmt: skip


def test_the_run_folder_holds_all_files_and_no_others(emulated: Run) -> None:
    tokens = {name for name in emulated.files if name.endswith(".tokens")}
    assert len(tokens) == 1
    assert emulated.files - tokens == FILES | {"even.json", "even-plan.yaml"}


def test_running_again_replaces_the_finished_run(real: Run) -> None:
    assert {name for name in real.files if not name.endswith(".tokens")} == FILES


def test_the_summary_has_the_promised_figures(emulated: Run) -> None:
    s = emulated.summary
    assert s["loss_first"] == emulated.metrics[0]["loss"] and s["loss_last"] == emulated.metrics[-1]["loss"]
    assert (s["emulated"], s["time_scale"], s["steps"]) == (True, 20, 3)
    positive = ("heldout_loss", "unigram_loss", "tokens_per_second", "predicted_tokens_per_second",
                "even_split_tokens_per_second", "share_of_physical_bound")  # fmt: skip
    assert all(s[key] > 0 for key in positive)
    assert s["wall_tokens_per_second"] == pytest.approx(s["tokens_per_second"] / 20)
    assert s["even_losses_differ"] < 1e-4
    assert s["share_of_homogeneous_bound"] is None  # no type holds the model by itself
    assert 0 <= s["overrun_ratio"] <= 1 and 0 <= s["unaccounted_ratio"] <= 1
    assert json.loads(emulated.result.out) == s


def test_the_summary_has_the_peak_memory_of_devices_that_count_it(emulated: Run, real: Run) -> None:
    """What lives inside one action is predicted and not counted."""
    for peak in emulated.summary["peak_bytes"].values():
        assert 0 < peak["measured"] <= peak["predicted"]
    assert len(emulated.summary["peak_bytes"]) == emulated.used
    assert all(peak["measured"] is None for peak in real.summary["peak_bytes"].values())


def test_the_start_is_told_by_its_parts(emulated: Run) -> None:
    start = emulated.summary["start"]
    assert set(start) == {f"{part}_seconds" for part in (
        "plan", "ray", "import", "join", "load", "rehearsal", "first_step")}  # fmt: skip
    assert all(seconds >= 0 for seconds in start.values())
    parts = sum(start[f"{part}_seconds"] for part in ("plan", "ray", "import", "join", "load"))
    assert emulated.summary["start_seconds"] == pytest.approx(parts)


def test_the_history_of_a_run_is_whole(emulated: Run, real: Run) -> None:
    assert emulated.summary["history_problems"] == real.summary["history_problems"] == []


def test_a_run_that_ends_leaves_no_process_and_no_file(emulated: Run, real: Run) -> None:
    assert emulated.left == [] and real.left == []


def test_losses_that_are_no_numbers_are_told_as_none(tmp_path: Path) -> None:
    """Every step after the first, in both runs. Seeded bugs: the figure of a loss that is none ends a finished run with
    a traceback; the even run does not skip, so its failure does."""
    write_job(tmp_path)
    edit(
        tmp_path / "job.yaml",
        ("learning_rate: 3e-3", "learning_rate: 1e39"),
        ("output: run", "output: run\non_failure: {not_a_number: skip}\ncompare: {even_steps: 2}"),
    )
    with launched(tmp_path) as launch:
        result = launch.end()
        assert launch.left() == []
    assert result.exit_code == 0, result.err
    assert " -> none in 3 steps" in result.out and "best even split" in result.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss_last"] is None and summary["even_losses_differ"] is not None


def test_a_comparison_that_fails_takes_nothing_from_the_run(tmp_path: Path) -> None:
    """The tokens are gone when the even split loads them. Seeded bug: the run has failed, and has no summary."""
    write_job(tmp_path)
    edit(
        tmp_path / "job.yaml",
        ("steps: 3", "steps: 60"),
        ("every: 3", "every: 60"),
        ("output: run", "output: run\ncompare: {even_steps: 2}"),
    )
    with launched(tmp_path) as launch:
        launch.training()
        next((tmp_path / "run").glob("*.tokens")).unlink()
        result = launch.end()
        assert launch.left() == []
    assert result.exit_code == 0, result.err
    assert "warning: no comparison with the even split: rank " in result.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 60
    assert not (tmp_path / "run" / "even.json").exists()
