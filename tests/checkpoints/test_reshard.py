"""Whatever plan wrote a checkpoint, a device of any other gets its own numbers and reads little more."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hethub.checkpoints.manifest import CheckpointError, read_manifest
from hethub.checkpoints.reshard import Need, Reader, needs, stored_parameters_differ
from hethub.program.actions import Program
from tests.checkpoints.made import cut, known_numbers, make_checkpoint, parameters_of
from tests.plan_strategies import compile_plan, plans, six_plans

PLANS = six_plans()
PROGRAMS = {name: compile_plan(plan) for name, plan in PLANS.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(folder / name, plan, PROGRAMS[name], 5) for name, plan in PLANS.items()}


def check_reading(path: Path, program: Program) -> None:
    """Every device of `program` gets the numbers that it needs, and all updaters together each element once."""
    manifest = read_manifest(path / "manifest")
    parameters = program.ownership.parameters
    assert not stored_parameters_differ(manifest, parameters)
    numbers = known_numbers(parameters)
    seen = {key: np.zeros(whole.shape, dtype=int) for key, whole in numbers.items()}
    for device in program.layout.used:
        with Reader(path, manifest) as reader:
            for need in needs(program, device):
                axis = parameters[need.parameter].axis
                expected = cut(numbers[need.kind, need.parameter], axis, need.start, need.stop)
                assert np.array_equal(reader.read(need), expected)
                cut(seen[need.kind, need.parameter], axis, need.start, need.stop)[...] += 1
    for (kind, _), counts in seen.items():
        assert (counts >= 1).all() if kind == 0 else (counts == 1).all()


@pytest.mark.parametrize(("writer", "reader"), list(product(PLANS, PLANS)))
def test_every_pair_of_six_plans(written: dict[str, Path], writer: str, reader: str) -> None:
    check_reading(written[writer], PROGRAMS[reader])


@given(plan=plans("fp32"))
@settings(max_examples=40)
def test_a_random_plan_reads_what_it_wrote(tmp_path_factory: pytest.TempPathFactory, plan) -> None:
    """Seen to catch: slices stored with their own axis first instead of the cut axis; an offset that forgot the slices
    before it; moments of what is held read instead of what is updated."""
    program = compile_plan(plan)
    check_reading(make_checkpoint(tmp_path_factory.mktemp("c") / "c", plan, program, 1), program)


@given(data=st.data())
@settings(max_examples=40)
def test_any_part_of_a_parameter(written: dict[str, Path], data: st.DataObject) -> None:
    path = written[data.draw(st.sampled_from(sorted(PLANS)))]
    manifest = read_manifest(path / "manifest")
    parameters = parameters_of(PLANS["one device"])
    number = data.draw(st.integers(0, len(parameters) - 1))
    size = parameters[number].shape[parameters[number].axis]
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    kind = data.draw(st.integers(0, 2))
    with Reader(path, manifest) as reader:
        found = reader.read(Need(kind, number, start, stop))
    expected = cut(known_numbers(parameters)[kind, number], parameters[number].axis, start, stop)
    assert np.array_equal(found, expected)


def test_only_the_files_that_have_a_part_are_opened(written: dict[str, Path], tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", PLANS["unequal stages"], PROGRAMS["unequal stages"], 5)
    manifest = read_manifest(path / "manifest")
    (path / "c-0-0.state").unlink()  # of the last stage
    with Reader(path, manifest) as reader:
        first = next(n for n, p in enumerate(manifest.parameters) if "layers.0." in p.name)
        reader.read(Need(0, first, 0, 1))
        with pytest.raises(CheckpointError, match=r"c-0-0\.state: cannot be opened"):
            reader.read(Need(0, len(manifest.parameters) - 1, 0, 1))
