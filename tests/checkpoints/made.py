"""Checkpoints made without training: known numbers, cut and written as a plan's devices would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hethub.checkpoints.manifest import (
    KINDS,
    Manifest,
    StateFileSpec,
    StoredParameter,
    TrainingSpec,
    state_file_name,
)
from hethub.checkpoints.state_file import block_bytes_for, write_state_file
from hethub.checkpoints.store import Store
from hethub.cost.shapes import Parameter, model_parameters
from hethub.program.actions import Program
from hethub.specs.llama_config import config_of
from hethub.specs.plan import Plan

Numbers = Mapping[tuple[int, int], npt.NDArray[np.float32]]
"""(kind, parameter) -> the whole of it."""


def known_numbers(parameters: tuple[Parameter, ...], seed: int = 0) -> Numbers:
    """Other numbers for each element of each kind."""
    random = np.random.default_rng(seed)
    return {
        (kind, n): random.standard_normal(p.shape).astype(np.float32)
        for kind in range(len(KINDS))
        for n, p in enumerate(parameters)
    }


def cut(whole: npt.NDArray[np.float32], axis: int, start: int, stop: int) -> npt.NDArray[np.float32]:
    """Indices [start, stop) of the cut axis."""
    return whole[start:stop] if axis == 0 else whole[:, start:stop]


def training_of(plan: Plan) -> TrainingSpec:
    """A training of the plan's workload."""
    workload = plan.workload
    return TrainingSpec(
        seed=1,
        steps=10,
        sequence_length=workload.sequence_length,
        global_batch=workload.global_batch,
        precision=workload.precision,
        held_out=0.2,
        tokens="0" * 64,
        optimizer={"learning_rate": 1e-3},
        model=config_of(workload.model),
    )


def write_files(
    store: Store, plan: Plan, program: Program, step: int, seed: int = 0, attempt: int = 1
) -> Manifest:
    """Write every device's file as its saver does; the manifest is returned, not written."""
    table = program.ownership
    numbers = known_numbers(table.parameters, seed)
    devices = plan.cluster.devices()
    folder = store.partial(step, attempt)
    folder.mkdir(parents=True)
    files = []
    for device in program.layout.used:
        slices = [table.slices[n] for n in table.by_updater.get(device, ())]
        parts = [
            np.moveaxis(
                cut(numbers[kind, s.parameter], table.parameters[s.parameter].axis, s.start, s.stop),
                table.parameters[s.parameter].axis,
                0,
            ).tobytes()
            for kind in range(len(KINDS))
            for s in slices
        ]
        data = b"".join(parts)
        block = block_bytes_for(len(data))
        path = folder / state_file_name(devices[device].name)
        digest = write_state_file(path, memoryview(data), block)
        files.append(
            StateFileSpec(
                device=devices[device].name,
                bytes=path.stat().st_size,
                block_bytes=block,
                digest=digest,
                slices=tuple((s.parameter, s.start, s.stop) for s in slices),
            )
        )
    return Manifest(
        hethub="test",
        run="run",
        attempt=attempt,
        step=step,
        updates=step,
        learning_rate=1e-3,
        dtype="fp32",
        plan="1" * 64,
        training=training_of(plan),
        parameters=tuple(StoredParameter(name=p.name, shape=p.shape, axis=p.axis) for p in table.parameters),
        files=tuple(files),
    )


def make_checkpoint(folder: Path, plan: Plan, program: Program, step: int, seed: int = 0) -> Path:
    """A whole checkpoint in `folder`, the run's `checkpoints`."""
    store = Store(folder)
    return store.commit(write_files(store, plan, program, step, seed))


def parameters_of(plan: Plan) -> tuple[Parameter, ...]:
    """The plan's parameters."""
    return model_parameters(plan.workload.model)
