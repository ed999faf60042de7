"""Bytes on every device at its peak: what the runtime's tally of live storages will count, and its workspace.

Saved activations follow the operators of `hethub/launch/model.py`, which saves per decoder and token: both
norms' inputs and outputs (4 x hidden), query, repeated key and value, attention output (4 x heads x
head_dim), gate, up and their product (3 x ffn), and in fp32 two norm scales and one log-sum per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from hethub.cost.compute import ComputeModel, gradient_bytes, state_bytes
from hethub.cost.shapes import BYTES, layer_kind
from hethub.specs.cluster import DeviceType
from hethub.specs.layout import Layout, PipelinePlace, RankPlace, Share, StagePlace
from hethub.specs.workload import Workload

__all__ = ["MemoryUse", "activation_bytes", "device_memory", "usable_bytes", "workspace_bytes"]

# Buffers of each kind (activation in, gradient in, and the message being sent each way) that a stage keeps.
_RECEIVE_DEPTH = 2
_SEND_BUFFERS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes by purpose. `activations` and `buffers` peak inside the pipeline, `reduction` after it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    workspace: int
    reduction: int

    @property
    def total(self) -> int:
        """Peak bytes: reduction buffers come when activations are gone."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + max(self.activations + self.buffers + self.workspace, self.reduction)
        )

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def usable_bytes(device_type: DeviceType) -> int:
    """What a plan may use: the device's memory less what the driver and framework take."""
    return device_type.memory_bytes - device_type.memory_reserve_bytes


def activation_bytes(workload: Workload, share: Share, layer: int, rows: int, size: int) -> int:
    """Bytes that one layer keeps for its backward pass of `rows` sequences, its output not counted."""
    model = workload.model
    tokens = rows * workload.sequence_length
    kind = layer_kind(model, layer)
    if kind == "embedding":
        return tokens * 8
    if kind == "head":
        vocab = share.vocab[1] - share.vocab[0]
        # norm input and output, its scale, probabilities in fp32 (fp64 if the job is), targets
        wide = gradient_bytes(workload.precision)
        return tokens * (2 * model.hidden_size * size + wide + vocab * wide + 8)
    heads, ffn = share.heads[1] - share.heads[0], share.ffn[1] - share.ffn[0]
    return tokens * ((4 * model.hidden_size + 4 * heads * model.head_dim + 3 * ffn) * size + (2 + heads) * 4)


def workspace_bytes(workload: Workload, share: Share, stage: StagePlace, rows: int, size: int) -> int:
    """The largest temporary of any layer in the stage: gradients of its widest tensors, or the logits."""
    model = workload.model
    tokens = rows * workload.sequence_length
    ffn, vocab = share.ffn[1] - share.ffn[0], share.vocab[1] - share.vocab[0]
    needs = [tokens * 2 * model.hidden_size * size]
    if stage.layers[1] > 1 and stage.layers[0] <= model.layers:
        needs.append(tokens * (2 * model.hidden_size + 3 * ffn) * size)
    if stage.layers[1] == model.layers + 2:
        needs.append(tokens * vocab * (size + gradient_bytes(workload.precision)))
    return max(needs)


def _stage_use(
    compute: ComputeModel, pipeline: PipelinePlace, stage: StagePlace, rank: RankPlace, rows: int
) -> MemoryUse:
    """One rank of one stage, optimizer and reduction left out (they follow ownership)."""
    workload = compute.workload
    size = BYTES[compute.graph.devices[rank.device].type.dtype_for(workload.precision)]
    elements = compute.stage_parameters(rank.share, stage.layers)
    boundary = rows * workload.sequence_length * workload.model.hidden_size * size
    saved = sum(activation_bytes(workload, rank.share, layer, rows, size) for layer in range(*stage.layers))
    held = min(stage.in_flight, pipeline.micro_batches)
    first, last = stage.layers[0] == 0, stage.layers[1] == workload.model.layers + 2
    output = 0 if last else boundary
    if stage.recompute == "full":
        entry = rows * workload.sequence_length * 8 if first else boundary
        activations = held * entry + saved + output
    else:
        activations = held * (saved + output)
    ways = (0 if first else 1) + (0 if last else 1)
    return MemoryUse(
        weights=elements * size,
        gradients=elements * gradient_bytes(workload.precision),
        optimizer=0,
        activations=activations,
        buffers=ways * boundary * (_RECEIVE_DEPTH + _SEND_BUFFERS),
        workspace=workspace_bytes(workload, rank.share, stage, rows, size),
        reduction=0,
    )


def device_memory(
    compute: ComputeModel,
    layout: Layout,
    owned_elements: Mapping[int, int] | None = None,
    incoming_elements: Mapping[int, int] | None = None,
) -> dict[int, MemoryUse]:
    """Peak memory of every used device.

    `owned_elements` and `reduction_bytes` (device -> count) come from the ownership table; without them a
    device is taken to update all that it holds, which is the most it can be given.
    """
    found: dict[int, MemoryUse] = {}
    for pipeline in layout.pipelines:
        for stage in pipeline.stages:
            for replica in stage.replicas:
                rows = replica.rows[1] - replica.rows[0]
                for rank in replica.ranks:
                    use = _stage_use(compute, pipeline, stage, rank, rows)
                    found[rank.device] = found[rank.device] + use if rank.device in found else use
    precision = compute.workload.precision
    for device, use in found.items():
        elements = use.gradients // gradient_bytes(precision)
        owned = elements if owned_elements is None else owned_elements.get(device, 0)
        extra = (
            0 if incoming_elements is None else incoming_elements.get(device, 0) * gradient_bytes(precision)
        )
        found[device] = use + MemoryUse(
            weights=0,
            gradients=0,
            optimizer=owned * state_bytes(precision),
            activations=0,
            buffers=0,
            workspace=0,
            reduction=extra,
        )
    return found
