"""Measuring a device: rows of the profile format, and a folder that is gone on with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.memory import RankShape, layer_bytes
from hethub.cost.profiles.profile import host_class, load_profile
from hethub.cost.shapes import Work
from hethub.launch import measuring
from hethub.launch.link_profiler import OPERATIONS
from hethub.launch.measuring import Measured, measure_layers, measure_links
from hethub.launch.profiler import LayerProfiler, Spread, repeated
from hethub.specs.layout import Share
from hethub.timeline.record import Kind
from tests.launch.small_job import edit, hethub, write_job
from tests.plan_strategies import NAMED_PLANS, SEQUENCE, tiny_model


def _profiler() -> LayerProfiler:
    return LayerProfiler(tiny_model(), "fast", SEQUENCE, "fp32", torch.float32, torch.device("cpu"))


def test_every_kind_of_layer_is_measured_once_and_a_second_run_goes_on(tmp_path: Path) -> None:
    told: list[Measured] = []
    assert measure_layers(_profiler(), [1], tmp_path, 0.0, told.append) == 3
    assert len(told) == 15
    before = load_profile(tmp_path)
    assert measure_layers(_profiler(), [1, 2], tmp_path, 0.0, told.append) == 3
    after = load_profile(tmp_path)
    assert after.layers[:3] == before.layers
    assert {(row.layer_kind, row.micro_batch) for row in after.layers} == {
        (kind, rows) for kind in ("embedding", "decoder", "head") for rows in (1, 2)
    }
    assert all(row.forward_seconds > 0 and row.backward_seconds for row in after.layers)


def test_messages_collectives_and_the_work_of_messages_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_SEND_BYTES", (1 << 10, 1 << 20))
    monkeypatch.setattr(measuring, "_WORK_BYTES", (1 << 10, 1 << 20))
    monkeypatch.setattr(measuring, "_GROUP_BYTES", (1 << 14,))
    where = ("intra/fast", host_class("fast"), tmp_path, 0.0, lambda measured: None)
    assert measure_links(*where) == 3 * 2 + 3
    profile = load_profile(tmp_path)
    assert {row.operation for row in profile.transfers} == set(OPERATIONS)
    assert all(row.time_seconds > 0 for row in profile.transfers)
    assert measure_links(*where) == 0
    work = profile.message_work("fast")
    assert work is not None
    assert profile.message_work("slow") is None


def test_a_layer_keeps_for_its_backward_what_the_memory_model_says(tmp_path: Path) -> None:
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    profiler = _profiler()
    shape = RankShape(plan.workload, Share.whole(profiler.model), 2, 4)
    assert plan.workload.model == profiler.model
    row, _ = profiler.measure(1, 2, 0.0)
    assert row.kept_bytes == layer_bytes(shape, "decoder").kept
    assert row.peak_bytes is None  # a host's allocator does not count
    assert row.spread is not None


def test_a_repetition_counts_with_the_mean_of_its_calls() -> None:
    turns = iter(range(10**6))

    def once() -> list[float]:  # pauses in turns, as a CPU quota makes them: 30 ms every second call
        return [0.03 * (next(turns) % 2)]

    (spread,) = repeated(once, 0.0)
    assert spread.seconds == pytest.approx(0.015, rel=0.4)


def test_of_skewed_times_the_mean_counts_but_not_what_was_held_up() -> None:
    """A step adds them up. Seeded bug: the median, which is 1 here."""
    assert Spread.of([1.0, 1.0, 1.0, 1.9, 1.9]).seconds == pytest.approx(1.36)
    assert Spread.of([1.0, 1.0, 1.0, 1.0, 9.0]).seconds == 1.0


def test_a_profile_sets_what_a_whole_layer_takes(tmp_path: Path) -> None:
    plan = NAMED_PLANS["pipeline of 2"]("fp32")
    model, types = plan.workload.model, plan.cluster.device_types
    name = next(iter(types))
    profiler = LayerProfiler(model, name, SEQUENCE, "fp32", torch.float32, torch.device("cpu"))
    measure_layers(profiler, [1, 2], tmp_path, 0.0, lambda measured: None)
    profile = load_profile(tmp_path)
    plain, measured = (ComputeModel(CostGraph(plan.cluster), plan.workload, p) for p in (None, profile))
    whole = Share.whole(model)
    rows = {(row.layer_kind, row.micro_batch): row for row in profile.layers}
    for kind in ("embedding", "decoder", "head"):
        forward = sum(measured.segment_seconds(types[name], kind, whole, 2, Work(Kind.FORWARD)))
        assert forward == pytest.approx(rows[kind, 2].forward_seconds)
    for other in types.keys() - {name}:
        args = (types[other], "decoder", whole, 2, Work(Kind.FORWARD))
        assert measured.segment_seconds(*args) == plain.segment_seconds(*args)


MEASURE = (
    "profile",
    "measure",
    "cluster.yaml",
    "profile",
    "--device-type",
    "fast",
    "--rows",
    "1",
    "--seconds",
    "0",
)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("precision: fp32", "precision: fp16"), 2, "device type fast: would be measured in fp16"),
        (
            ("fast: {vendor: cpu", "fast: {substitute_dtype: {fp32: fp16}, vendor: cpu"),
            2,
            "device type fast: would be measured in fp16",
        ),
        (("fast: {vendor: cpu", "fast: {vendor: huawei"), 4, "torch finds no npu device here"),
        (("name: two-speeds", "name: two-speeds"), 2, "profile: cannot be written (File exists)"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, change: tuple[str, str], code: int, words: str
) -> None:
    """Seeded bugs: each of these was a traceback."""
    write_job(tmp_path)
    edit(tmp_path / "cluster.yaml", ("peak_gflops: {fp32: ", "peak_gflops: {fp16: 1.0, fp32: "), change)
    (tmp_path / "profile").touch()  # where a folder should be
    result = hethub(capsys, tmp_path, *MEASURE)
    assert result.exit_code == code
    assert result.err.startswith(f"hethub: {words}") and len(result.err.splitlines()) == 1


def test_measuring_without_torch_names_the_extra(tmp_path: Path) -> None:
    write_job(tmp_path)
    code = "import sys; sys.modules['torch'] = None; from hethub.cli.main import run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, *MEASURE], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        "hethub: torch: not installed, measuring needs it. Install the extra: pip install 'hethub[launch]'.\n"
    )
