"""What the work of another engine's stage costs: measured profiles, and a roofline for what they lack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hethub import catalog
from hethub.cost.engines import EngineRun
from hethub.cost.footprint import rank_parameters
from hethub.cost.profiles.artifact import intra_link_class
from hethub.cost.profiles.profile import LayerKey, Profile
from hethub.cost.shapes import BYTES, layer_kind
from hethub.errors import InputError

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
    """Seconds of one micro-batch on one replica, without messages; `gather_seconds` after each received one."""

    forward_seconds: float
    backward_seconds: float
    update_seconds: float
    gather_seconds: float


def stage_price(
    run: EngineRun, stage: int, device_type: str, profile: Profile, coefficients: Coefficients
) -> StagePrice:
    """Times of a stage on one device type.

    Raises InputError naming the device type, layer kind and degree where the profile lacks a layer.
    """
    first, last = run.stages[stage].layers
    slow = coefficients.slow_down.get(device_type, 1.0)
    forward = backward = update = 0.0
    for layer in range(first, last):
        kind: str = layer_kind(run.model, layer)
        kind = "decoder_first" if layer == 1 and _has(profile, run, device_type, "decoder_first") else kind
        key = _key(run, device_type, kind)
        seconds = profile.seconds(key, "forward", run.micro_batch, slow)
        if seconds is None:
            raise InputError(
                f"the profile has no {kind} of {run.model.name} on {device_type} at tensor-parallel degree "
                f"{run.tensor_parallel}, {run.sequence_length} tokens, {run.dtype}. Measure it, or leave the run out."
            )
        forward += seconds
        timed = profile.seconds(key, "backward", run.micro_batch, slow)
        backward += timed if timed is not None else _embedding_backward(run, device_type)
        update += profile.seconds(key, "update", run.micro_batch) or 0.0
    gather = coefficients.host_pause_seconds + _gather(run, device_type, profile)
    return StagePrice(forward, backward, update, gather)


def _key(run: EngineRun, device_type: str, kind: str) -> LayerKey:
    return LayerKey(run.model.name, device_type, kind, run.tensor_parallel, run.sequence_length, run.dtype)


def _has(profile: Profile, run: EngineRun, device_type: str, kind: str) -> bool:
    return bool(profile.rows(_key(run, device_type, kind)))


def _embedding_backward(run: EngineRun, device_type: str) -> float:
    """Roofline: the gradient of every row is read and added into the table's, which is cleared and added once."""
    known = catalog.device(device_type)
    if known.memory_bandwidth_gb_s is None:
        raise InputError(f"no memory bandwidth is known for {device_type}. Give it in the catalog.")
    share = known.memory_efficiency or catalog.DEFAULT_MEMORY_EFFICIENCY
    rows = 3 * run.micro_batch * run.sequence_length * run.model.hidden_size
    table = 4 * rank_parameters(run.model, 0, run.tensor_parallel)
    return BYTES[run.dtype] * (rows + table) / (known.memory_bandwidth_gb_s * 1e9 * share)


def _gather(run: EngineRun, device_type: str, profile: Profile) -> float:
    """All-gather of the ranks' slices inside the receiving group."""
    degree = run.tensor_parallel
    if degree == 1 or not run.engine.slices:
        return 0.0
    name = intra_link_class(device_type)
    seconds = profile.transfer_seconds("all_gather", name, degree, run.message_bytes / degree)
    if seconds is None:
        raise InputError(f"the profile has no all_gather of {degree} devices over {name}. Measure it.")
    return seconds
