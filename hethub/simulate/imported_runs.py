"""Importers of other engines' measured runs: Sailor's on DeepSpeed, Aceso's on Megatron-LM (one folder of data).

OPT-350M there is not the published one: 1024-wide embedding, untied head, pre-norm; its vocabulary is padded.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hethub.cost.engines import DEEPSPEED, MEGATRON, EngineRun, ReplicaGroup, RunStage
from hethub.errors import InputError
from hethub.specs.workload import Model

__all__ = ["MeasuredRun", "MeasuredStage", "load_megatron_runs", "load_runs", "opt_model"]

_GPT2_WORDS, _PADDING = 50257, 128
_MIB = 2**20
_GH200 = "GH200-96GB"
_OF_A_FIELD = (
    "peak memory",
    "earlier peak memory",
    "gradient-reduce time",
)  # doubts that are not of the time
_OPS_PER_DECODER, _HEAD_OPS = 13, 2
# Of a decoder's 13 operators the first six are the attention half; these two stand for the halves.
_ATTENTION_OP, _FEED_FORWARD_OP = 4, 9


@dataclass(frozen=True, slots=True)
class MeasuredStage:
    """The allocator's peak on the fullest rank of a stage."""

    allocated_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """A run and what was measured of it; None where it was not. `published` are other predictors' answers.
    `is_doubtful` where the data doubts that the step's time is this plan's."""

    run: EngineRun
    step_seconds: float
    repeated_seconds: float | None
    peak_bytes: float | None
    stages: tuple[MeasuredStage, ...]
    published: Mapping[str, Any]
    is_doubtful: bool = False

    @property
    def seconds(self) -> float:
        """The mean of both campaigns where there are two."""
        return (
            self.step_seconds
            if self.repeated_seconds is None
            else (self.step_seconds + self.repeated_seconds) / 2
        )


def opt_model(tensor_parallel: int, *, tied: bool = False) -> Model:
    """OPT-350M as those engines build it: GPT-2's words padded to a multiple of 128 x degree."""
    padding = _PADDING * tensor_parallel
    return Model(
        name="OPT-350M",
        hidden_size=1024,
        layers=24,
        heads=16,
        kv_heads=16,
        head_dim=64,
        ffn_size=4096,
        vocab_size=-(-_GPT2_WORDS // padding) * padding,
        tied=tied,
        rope_theta=10000.0,
        norm_epsilon=1e-5,
        rope_scaling=None,
        family="gpt",
        positions=2048,
    )


def load_runs(path: Path) -> tuple[MeasuredRun, ...]:
    """The runs of measured_runs.json. Raises InputError where the file is no such file or lacks a key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}). Name measured_runs.json.") from None
    try:
        for entry in content["runs"]:
            _require_uniform(path, entry)
        return tuple(_run(entry) for entry in content["runs"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: a run lacks {error}. Name measured_runs.json.") from None


def _require_uniform(path: Path, entry: dict[str, Any]) -> None:
    """Refuse a plan that an `EngineRun` cannot hold: it would be read as another one."""
    stages = entry["plan"]["stages"]
    for number, stage in enumerate(stages):
        for key in ("tensor_parallel", "micro_batch"):
            if any(replica.get(key, entry[key]) != entry[key] for replica in stage["replicas"]):
                raise InputError(
                    f"{path}: {entry['run_id']} plan.stages[{number}]: a replica's {key} is not the run's "
                    f"{entry[key]}. Leave the run out."
                )
    counts = {sum(replica["count"] for replica in stage["replicas"]) for stage in stages}
    if len(counts) != 1:
        raise InputError(f"{path}: {entry['run_id']}: stages have {counts} replicas. Leave the run out.")


def _run(entry: dict[str, Any]) -> MeasuredRun:
    stages = tuple(
        RunStage(
            (stage["layers"][0], stage["layers"][1]),
            tuple(
                ReplicaGroup(replica["device_type"])
                for replica in stage["replicas"]
                for _ in range(replica["count"])
            ),
        )
        for stage in entry["plan"]["stages"]
    )
    run = EngineRun(
        name=entry["run_id"],
        engine=DEEPSPEED,
        model=opt_model(entry["tensor_parallel"]),
        sequence_length=entry["sequence_length"],
        dtype="fp32",
        tensor_parallel=entry["tensor_parallel"],
        micro_batch=entry["micro_batch"],
        micro_batches=entry["micro_batches_per_replica"],
        stages=stages,
    )
    earlier = entry.get("earlier_measurement") or {}
    doubts = entry.get("doubtful", ())
    forgotten = any(doubt.startswith("earlier peak memory") for doubt in doubts)
    memories = [entry.get("measured_peak_memory_mib"), None if forgotten else earlier.get("peak_memory_mib")]
    known = [memory for memory in memories if memory is not None]
    return MeasuredRun(
        run=run,
        step_seconds=entry["measured_iteration_s"],
        repeated_seconds=earlier.get("iteration_s"),
        peak_bytes=sum(known) / len(known) * _MIB if known else None,
        stages=(),
        published=entry.get("artifact_predictors_rerun", {}),
        is_doubtful=not all(doubt.startswith(_OF_A_FIELD) for doubt in doubts),
    )


def load_megatron_runs(path: Path) -> tuple[MeasuredRun, ...]:
    """The runs of measured_runs_megatron.csv, one row a stage. Raises InputError with file, line and column."""
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                rows[row["run_id"]].append(row)
    except (OSError, KeyError) as error:
        raise InputError(f"{path}: cannot be read ({error}). Name measured_runs_megatron.csv.") from None
    return tuple(_megatron_run(path, name, found) for name, found in rows.items())


def _megatron_run(path: Path, name: str, rows: list[dict[str, str]]) -> MeasuredRun:
    def number(row: dict[str, str], column: str) -> float:
        try:
            return float(row[column])
        except (KeyError, ValueError):
            raise InputError(f"{path}: {name} {column}: is not a number. Mend the row.") from None

    first = rows[0]
    degree, replicas = int(number(first, "tensor_parallel")), int(number(first, "data_parallel"))
    groups = (ReplicaGroup(_GH200),) * replicas
    model = opt_model(degree)
    stages = tuple(_cut(int(number(r, "first_op")), int(number(r, "end_op")), model, groups) for r in rows)
    run = EngineRun(
        name=name,
        engine=MEGATRON,
        model=model,
        sequence_length=2048,
        dtype="fp32",
        tensor_parallel=degree,
        micro_batch=int(number(first, "micro_batch")),
        micro_batches=int(number(first, "micro_batches_per_replica")),
        stages=stages,
    )
    return MeasuredRun(
        run=run,
        step_seconds=max(number(row, "iteration_ms") for row in rows) / 1e3,
        repeated_seconds=None,
        peak_bytes=max(number(row, "device_used_mib") for row in rows) * _MIB,
        stages=tuple(MeasuredStage(number(row, "peak_allocated_mib") * _MIB) for row in rows),
        published={},
    )


def _cut(first: int, end: int, model: Model, groups: tuple[ReplicaGroup, ...]) -> RunStage:
    """A range of operators (1 embedding, 13 a decoder, 2 head) as halves, and as the layers nearest to it."""

    def held(operator: int) -> int:
        return sum(first <= 1 + layer * _OPS_PER_DECODER + operator < end for layer in range(model.layers))

    ends = [_layer_at(first, model), _layer_at(end, model)]
    return RunStage((ends[0], ends[1]), groups, (held(_ATTENTION_OP), held(_FEED_FORWARD_OP)))


def _layer_at(operator: int, model: Model) -> int:
    if operator == 0:
        return 0
    if operator >= 1 + model.layers * _OPS_PER_DECODER + _HEAD_OPS:
        return model.layers + 2
    return 1 + round((operator - 1) / _OPS_PER_DECODER)
