"""What the work of another engine's stage costs: measured profiles, and a roofline for what they lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from hethub import catalog
from hethub.cost.engines import EngineRun
from hethub.cost.footprint import rank_parameters, rank_share
from hethub.cost.profiles.artifact import intra_link_class
from hethub.cost.profiles.profile import LayerKey, Profile
from hethub.cost.shapes import BYTES, LayerKind, Work, layer_kind, layer_segments
from hethub.errors import InputError
from hethub.timeline.record import Kind

__all__ = ["Coefficients", "StagePrice", "stage_price"]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The few figures that calibration may set; the defaults change nothing.

    `slow_down` by device type: how much longer the device's work takes in a whole run than a lone layer's profile says
    (what launches take is left alone).
    `host_pause_seconds`: what a received message costs the device, since the host waits for its header and launches
    nothing meanwhile. `overhead_bytes` by device type: context, libraries and the allocator's reserve.
    """

    slow_down: Mapping[str, float] = field(default_factory=dict)
    host_pause_seconds: float = 0.0
    overhead_bytes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StagePrice:
    """Seconds of one micro-batch on one replica, without messages; `gather_seconds` after each received one.

    `substitutes` says in words what was not measured and what stands in for it.
    """

    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    gather_seconds: float
    substitutes: frozenset[str]


class _Layer(NamedTuple):
    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    substitute: str | None


def stage_price(
    run: EngineRun,
    stage: int,
    device_type: str,
    profile: Profile,
    coefficients: Coefficients,
    *,
    strict: bool = False,
) -> StagePrice:
    """Times of a stage on one device type; a layer that was not measured is priced by a roofline.

    Raises InputError where the catalog or the profile lacks a figure; with `strict` also where it lacks a layer.
    """
    layers = [
        _layer(run, device_type, kind, profile, coefficients, strict=strict)
        for kind in (_kind(run, layer, device_type, profile) for layer in range(*run.stages[stage].layers))
    ]
    gather = coefficients.host_pause_seconds + _gather(run, device_type, profile)
    return StagePrice(
        sum(layer.forward_seconds for layer in layers),
        sum(layer.backward_seconds for layer in layers),
        sum(layer.update_seconds for layer in layers),
        gather,
        frozenset(layer.substitute for layer in layers if layer.substitute is not None),
    )


def _kind(run: EngineRun, layer: int, device_type: str, profile: Profile) -> str:
    """A layer's kind as the profile has it: some tell the first decoder from the others."""
    if layer == 1 and profile.rows(_key(run, device_type, "decoder_first")):
        return "decoder_first"
    return layer_kind(run.model, layer)


def _key(run: EngineRun, device_type: str, kind: str) -> LayerKey:
    return LayerKey(run.model.name, device_type, kind, run.tensor_parallel, run.sequence_length, run.dtype)


def _layer(
    run: EngineRun,
    device_type: str,
    kind: str,
    profile: Profile,
    coefficients: Coefficients,
    *,
    strict: bool,
) -> _Layer:
    key, slow = _key(run, device_type, kind), coefficients.slow_down.get(device_type, 1.0)
    forward = profile.seconds(key, "forward", run.micro_batch, slow)
    if forward is None:
        missing = (
            f"the profile has no {kind} of {run.model.name} on {device_type} at tensor-parallel degree "
            f"{run.tensor_parallel}, {run.sequence_length} tokens, {run.dtype}"
        )
        if strict:
            raise InputError(f"{missing}. Measure it, or leave the run out.")
        forward, backward, update = _roofline(run, device_type, kind, profile)
        return _Layer(forward * slow, backward * slow, update, f"{missing}: a roofline stands in")
    timed = profile.seconds(key, "backward", run.micro_batch, slow)
    backward = timed if timed is not None else _embedding_backward(run, device_type)
    return _Layer(forward, backward, profile.seconds(key, "update", run.micro_batch) or 0.0, None)


def _rates(device_type: str, dtype: str) -> tuple[float, float]:
    """Achievable flop/s and bytes/s. Raises InputError where the catalog lacks one."""
    try:
        known = catalog.device(device_type)
    except catalog.UnknownName as error:
        raise InputError(f"device type {device_type}: {error}") from None
    peak = known.peak_tflops.get(dtype)
    if peak is None or known.memory_bandwidth_gb_s is None:
        raise InputError(
            f"{device_type}: the catalog lacks its {dtype} peak or its bandwidth. Measure the layer."
        )
    return (
        peak * 1e12 * (known.matmul_efficiency or catalog.DEFAULT_MATMUL_EFFICIENCY),
        known.memory_bandwidth_gb_s * 1e9 * (known.memory_efficiency or catalog.DEFAULT_MEMORY_EFFICIENCY),
    )


def _roofline(run: EngineRun, device_type: str, kind: str, profile: Profile) -> tuple[float, float, float]:
    """Forward, backward and update as `cost.shapes` counts them: backward is twice the forward; a decoder reduces twice
    each way, an embedding forward, a head backward; the update reads and writes weight, gradient and moments."""
    flops, bandwidth = _rates(device_type, run.dtype)
    plain: LayerKind = "embedding" if kind == "embedding" else "head" if kind == "head" else "decoder"
    size, degree = BYTES[run.dtype], run.tensor_parallel
    segments = layer_segments(
        run.model,
        plain,
        rank_share(run.model, degree),
        run.micro_batch,
        seq=run.sequence_length,
        size=size,
        work=Work(Kind.FORWARD, members=degree, training=False),
    )
    compute = sum(max(o.flops / flops, o.bytes / bandwidth) for s in segments for o in s.operations)
    reduce = 0.0
    if degree > 1:
        name = intra_link_class(device_type)
        found = profile.transfer_seconds("all_reduce", name, degree, run.message_bytes)
        if found is None:
            raise InputError(f"the profile has no all_reduce of {degree} devices over {name}. Measure it.")
        reduce = found
    ways = {"embedding": (1, 0), "decoder": (2, 2), "head": (0, 1)}[plain]
    layer = {"embedding": 0, "decoder": 1, "head": run.model.layers + 1}[plain]
    update = 7 * size * rank_parameters(run.model, layer, degree) / bandwidth
    return compute + ways[0] * reduce, 2 * compute + ways[1] * reduce, update


def _embedding_backward(run: EngineRun, device_type: str) -> float:
    """Roofline: the gradient of every row is read and added into the table's, which is cleared and added once."""
    rows = 3 * run.micro_batch * run.sequence_length * run.model.hidden_size
    table = 4 * rank_parameters(run.model, 0, run.tensor_parallel)
    return BYTES[run.dtype] * (rows + table) / _rates(device_type, run.dtype)[1]


def _gather(run: EngineRun, device_type: str, profile: Profile) -> float:
    """All-gather of the ranks' slices inside the receiving group, where a message is received at all."""
    degree = run.tensor_parallel
    if degree == 1 or not run.engine.slices or len(run.stages) == 1:
        return 0.0
    name = intra_link_class(device_type)
    seconds = profile.transfer_seconds("all_gather", name, degree, run.message_bytes / degree)
    if seconds is None:
        raise InputError(f"the profile has no all_gather of {degree} devices over {name}. Measure it.")
    return seconds
