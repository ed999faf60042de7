"""Other training engines as data: in which order they work, how they send, what they hold.

A new engine is an entry here, not a branch in the simulator. Every figure says where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hethub.specs.workload import Model

__all__ = ["DEEPSPEED", "MEGATRON", "Engine", "EngineRun", "ReplicaGroup", "RunStage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a predictor must know of an engine.

    `order` is the schedule: `lockstep` (DeepSpeed's TrainSchedule: a stage exchanges with one neighbour a step and
    sends what it made the step before) or `1f1b` (sends at once). A message of up to `buffered_bytes` a rank waits in
    the library's buffer; for a larger one sender and receiver meet, and both are held until it is through. With
    `slices` a tensor-parallel rank sends its share and the receiving group gathers them; else every rank sends the
    whole. With `barrier` all devices meet before the gradient all-reduce. `dropout` keeps masks and dropped scores,
    `keeps_feed_forward_input` the input of an activation function that cannot work in place (GELU). The head keeps
    `logit_copies` of the logits, and its backward works on as many more.
    """

    name: str
    order: Literal["lockstep", "1f1b"]
    buffered_bytes: int
    slices: bool
    barrier: bool
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    bucket_bytes: int
    dropout: bool
    keeps_feed_forward_input: bool
    logit_copies: int

    @property
    def bytes_per_parameter(self) -> int:
        """Persistent bytes of one element of a rank: weight, gradient, moments, flattened copy for the all-reduce."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.bucket_bytes


_NCCL_BUFFER = 4 * 2**20  # NCCL_BUFFSIZE, its default: what a channel takes before the receiver has to come

# DeepSpeed 0.16.5 with Megatron-DeepSpeed, fp32, ZeRO off.
DEEPSPEED = Engine(
    name="deepspeed-pipeline",
    order="lockstep",
    buffered_bytes=_NCCL_BUFFER,
    slices=True,
    barrier=True,
    weight_bytes=4,
    gradient_bytes=4,
    optimizer_bytes=8,
    bucket_bytes=4,
    dropout=False,
    keeps_feed_forward_input=False,
    logit_copies=2,  # measured: layer_memory of the head; the loss works on a copy
)
# Megatron-LM as Aceso builds it, fp32: gradients are added up in one contiguous buffer, which is also reduced.
MEGATRON = Engine(
    name="megatron-1f1b",
    order="1f1b",
    buffered_bytes=2**62,  # sends and receives of a step are posted together
    slices=False,
    barrier=False,
    weight_bytes=4,
    gradient_bytes=4,
    optimizer_bytes=8,
    bucket_bytes=0,
    dropout=True,
    keeps_feed_forward_input=True,
    logit_copies=1,  # its cross-entropy exponentiates fp32 logits in place
)


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """A tensor-parallel group: its devices' type; each group stands on a node of its own."""

    device_type: str


@dataclass(frozen=True, slots=True)
class RunStage:
    """`layers` half-open; replica j exchanges with replica j of the next stage.

    `halves` counts attention and feed-forward halves where the engine cuts inside a layer; None is whole layers.
    """

    layers: tuple[int, int]
    replicas: tuple[ReplicaGroup, ...]
    halves: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRun:
    """A training step of another engine: uniform tensor parallelism, micro-batch and number of micro-batches."""

    name: str
    engine: Engine
    model: Model
    sequence_length: int
    dtype: str
    tensor_parallel: int
    micro_batch: int
    micro_batches: int
    stages: tuple[RunStage, ...]

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once under 1F1B."""
        return min(len(self.stages) - stage, self.micro_batches)

    @property
    def blocks(self) -> bool:
        """Whether the two ends of a message between stages meet."""
        size = self.message_bytes / (self.tensor_parallel if self.engine.slices else 1)
        return size > self.engine.buffered_bytes

    @property
    def message_bytes(self) -> int:
        """Activation between two stages, whole."""
        return self.sequence_length * self.model.hidden_size * self.micro_batch * 4
