"""Measuring a device: rows of the profile format, and a folder that is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.cost.profiles.profile import load_profile
from hethub.cost.shapes import Work
from hethub.launch.measuring import Measured, measure_layers, measure_sends
from hethub.launch.profiler import LayerProfiler, repeated
from hethub.specs.layout import Share
from hethub.timeline.record import Kind
from tests.plan_strategies import NAMED_PLANS, SEQUENCE, tiny_model


def _profiler() -> LayerProfiler:
    return LayerProfiler(tiny_model(), "fast", SEQUENCE, "fp32", torch.float32, torch.device("cpu"))


def test_every_kind_of_layer_is_measured_once_and_a_second_run_goes_on(tmp_path: Path) -> None:
    told: list[Measured] = []
    assert measure_layers(_profiler(), [1], tmp_path, 0.0, told.append) == 3
    assert len(told) == 9
    before = load_profile(tmp_path)
    assert measure_layers(_profiler(), [1, 2], tmp_path, 0.0, told.append) == 3
    after = load_profile(tmp_path)
    assert after.layers[:3] == before.layers
    assert {(row.layer_kind, row.micro_batch) for row in after.layers} == {
        (kind, rows) for kind in ("embedding", "decoder", "head") for rows in (1, 2)
    }
    assert all(row.forward_seconds > 0 and row.backward_seconds for row in after.layers)


def test_messages_between_two_processes_take_longer_the_larger_they_are(tmp_path: Path) -> None:
    assert measure_sends("shared-memory", tmp_path, 0.0, lambda measured: None) == 6
    rows = load_profile(tmp_path).transfers
    assert rows[-1].time_seconds > rows[0].time_seconds > 0
    assert measure_sends("shared-memory", tmp_path, 0.0, lambda measured: None) == 0


def test_a_repetition_counts_with_the_mean_of_its_calls() -> None:
    turns = iter(range(10**6))

    def once() -> list[float]:  # pauses in turns, as a CPU quota makes them: 30 ms every second call
        return [0.03 * (next(turns) % 2)]

    (spread,) = repeated(once, 0.0)
    assert spread.seconds == pytest.approx(0.015, rel=0.4)


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
