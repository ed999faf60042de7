"""Bytes on every device at its peak, in closed form: quick enough for a planner's search, and never too little.

What a micro-batch keeps follows the autograd functions of `hethub/launch/kernels.py`. With T tokens of a micro-batch, t
of them in this member's shard, hidden size D, query, key-value and feed-forward columns W, K and F of this rank and w
bytes an element, a decoder keeps

- 2 t D w: the inputs of both halves, and in wide numbers a norm's scale for each token of both;
- T (W + 2 K) w: queries, keys and values, turned; T 2 F w: gate and up;
- in a group 2 T D w more: the gathered inputs of both halves' column products;
- its attention core's T W w and one wide log-sum a head and token, which selective recomputation makes in RECOMPUTE.

A backward that is split leaves the products of weight gradients for later. Their operands are T (4 D + 2 W + 2 K + 3 F)
w a decoder: inputs and output gradients of its four products. Wide is fp32, or fp64 in an fp64 job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from hethub.cost.compute import ComputeModel, gradient_bytes, state_bytes
from hethub.cost.graph import is_host
from hethub.cost.shapes import (
    BYTES,
    LayerKind,
    held_elements,
    layer_kind,
    logit_chunk_tokens,
)
from hethub.specs.cluster import DeviceType
from hethub.specs.layout import (
    Layout,
    PipelinePlace,
    RankPlace,
    ReplicaPlace,
    Share,
    Span,
    StagePlace,
    sequence_span,
)
from hethub.specs.workload import Workload

__all__ = [
    "LayerBytes",
    "MemoryUse",
    "RankShape",
    "RankUse",
    "StageBytes",
    "apart_bytes",
    "cut_inside_elements",
    "device_memory",
    "layer_bytes",
    "on_host",
    "rank_shape",
    "rank_use",
    "rank_uses",
    "stage_bytes",
    "usable_bytes",
    "with_updates",
]

# Buffers of each kind (activation in, gradient in, and on an accelerator the message being sent each way) that a stage
# keeps, and the message that has been taken out of its buffer and not been used yet.
_RECEIVE_DEPTH = 2
_SEND_BUFFERS = 1
_TAKEN = 1
_LOSS_BYTES = 8
# Micro-batches of a stage that may wait for their weight part: of schedules that never split a backward, or do both
# parts behind each other. Under any other all in flight may.
_WAITING = {"1f1b": 0, "1f1b-split": 1, "gpipe": 0, "interleaved": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes by purpose. `activations` peak inside the pipeline; on a host they include what was sent of each and waits
    for an answer. `reduction` are messages with gradients or new weights: they come with the last backward or go with
    the first forward, beside the `one` micro-batch that is held then. New weights on their way from a host are among
    the `buffers`, since the answer comes at the step's end."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    one: int
    buffers: int
    workspace: int
    reduction: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        lasting = self.weights + self.gradients + self.optimizer + self.buffers + self.workspace
        return lasting + max(self.activations, self.one + self.reduction)

    def __add__(self, other: MemoryUse) -> MemoryUse:
        return MemoryUse(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def on_host(compute: ComputeModel, device: int) -> bool:
    """Whether the device's tensors lie in the host's memory, as messages do: a CPU's, and an emulated device's."""
    emulated = compute.graph.cluster.emulated_time_scale is not None
    return emulated or is_host(compute.graph.devices[device].type)


def usable_bytes(device_type: DeviceType) -> int:
    """What a plan may use: the device's memory less what the driver and framework take."""
    return device_type.memory_bytes - device_type.memory_reserve_bytes


# -- layers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankShape:
    """What decides the bytes of a layer on a rank: its share, its `rows` of a micro-batch, bytes of an element
    (`size`), and its place in a group of `members`, of which the largest vocabulary share is `largest_vocab`."""

    workload: Workload
    share: Share
    rows: int
    size: int
    members: int = 1
    member: int = 0
    largest_vocab: int = 0

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.workload.sequence_length

    @property
    def shard_tokens(self) -> int:
        """Of them in this member's shard."""
        start, stop = sequence_span(self.workload.sequence_length, self.members, self.member)
        return self.rows * (stop - start)

    @property
    def boundary_bytes(self) -> int:
        """Of this member's part of a stage's input or output."""
        return self.shard_tokens * self.workload.model.hidden_size * self.size

    @property
    def token_bytes(self) -> int:
        """Of token ids, or targets."""
        return self.tokens * 8


def rank_shape(compute: ComputeModel, replica: ReplicaPlace, member: int) -> RankShape:
    """The shape of a rank of a replica."""
    rank, workload = replica.ranks[member], compute.workload
    return RankShape(
        workload,
        rank.share,
        replica.rows[1] - replica.rows[0],
        BYTES[compute.graph.devices[rank.device].type.dtype_for(workload.precision)],
        len(replica.ranks),
        member,
        max(r.share.vocab[1] - r.share.vocab[0] for r in replica.ranks),
    )


class LayerBytes(NamedTuple):
    """Bytes of one layer and micro-batch: `kept` from forward to backward, of which `core` is what selective
    recomputation does without until RECOMPUTE; `stash` from an input backward to the weight part; and the most that
    is alive besides while forward, backward or a weight part compute."""

    kept: int
    core: int
    stash: int
    forward_workspace: int
    backward_workspace: int
    weight_workspace: int

    def __add__(self, other: LayerBytes) -> LayerBytes:  # type: ignore[override]  # layers follow each other
        """Of both layers: what is kept adds up, workspace is used in turn."""
        return LayerBytes(
            self.kept + other.kept,
            self.core + other.core,
            self.stash + other.stash,
            max(self.forward_workspace, other.forward_workspace),
            max(self.backward_workspace, other.backward_workspace),
            max(self.weight_workspace, other.weight_workspace),
        )


_NOTHING = LayerBytes(0, 0, 0, 0, 0, 0)


@lru_cache(maxsize=65536)
def layer_bytes(shape: RankShape, kind: LayerKind) -> LayerBytes:
    """What one layer needs (see the head of this module); its output is not counted."""
    return {"embedding": _embedding_bytes, "decoder": _decoder_bytes, "head": _head_bytes}[kind](shape)


def _embedding_bytes(shape: RankShape) -> LayerBytes:
    elements = shape.tokens * shape.workload.model.hidden_size
    whole, wide = elements * shape.size, gradient_bytes(shape.workload.precision)
    widened = elements * wide if shape.size < wide else 0
    # A group keeps row numbers of its own beside the tokens.
    own = shape.token_bytes if shape.members > 1 else 0
    return LayerBytes(
        kept=shape.token_bytes + own,
        core=0,
        stash=shape.token_bytes + whole,
        forward_workspace=2 * whole,
        backward_workspace=2 * whole + widened,
        weight_workspace=widened,
    )


def _decoder_bytes(shape: RankShape) -> LayerBytes:
    model, share, size = shape.workload.model, shape.share, shape.size
    heads, kv = share.heads[1] - share.heads[0], share.kv[1] - share.kv[0]
    hidden, ffn = model.hidden_size, share.ffn[1] - share.ffn[0]
    query, packed = heads * model.head_dim, (heads + 2 * kv) * model.head_dim
    tokens, shard, wide = shape.tokens, shape.shard_tokens, gradient_bytes(shape.workload.precision)
    gathered = 2 * tokens * hidden if shape.members > 1 else 0
    core = tokens * (query * size + heads * wide)
    kept = size * (2 * shard * hidden + tokens * (packed + 2 * ffn) + gathered) + 2 * shard * wide
    # a norm's backward in wide numbers, and where weights are narrow a product before it is added to its sum
    narrow = size < wide
    norm = shard * hidden * wide * (3 if narrow else 1)
    product = hidden * max(packed, query, 2 * ffn) * size if narrow else 0
    return LayerBytes(
        kept=kept + core,
        core=core,
        stash=size * tokens * (4 * hidden + 2 * query + packed - query + 3 * ffn),
        forward_workspace=size * tokens * (4 * hidden + max(query + packed, 3 * ffn))
        + shard * wide
        + gathered * size // 2,
        backward_workspace=size * tokens * (4 * hidden + max(query + 2 * packed, 5 * ffn)) + norm + product,
        weight_workspace=product,
    )


def _head_bytes(shape: RankShape) -> LayerBytes:
    """Keeps the hidden states' gradient and the loss. A chunk of logits is alive, wide and in the weights' type, beside
    narrow weights' gradient before it is added to its sum."""
    model, size, tokens = shape.workload.model, shape.size, shape.tokens
    vocab = shape.share.vocab[1] - shape.share.vocab[0]
    wide = gradient_bytes(shape.workload.precision)
    chunk = min(tokens, logit_chunk_tokens(tokens, shape.largest_vocab or vocab))
    narrow = size if size < wide else 0
    logits = chunk * (vocab * (wide + narrow) + 3 * wide)
    norm = 4 * shape.shard_tokens * model.hidden_size * wide
    return LayerBytes(
        kept=shape.boundary_bytes + _LOSS_BYTES,
        core=0,
        stash=0,
        forward_workspace=shape.boundary_bytes  # the input, which is not kept
        + (
            shape.token_bytes + tokens if shape.members > 1 else 0
        )  # targets among this rank's rows, and which are
        + 2 * tokens * (model.hidden_size * size + wide)
        + max(logits + vocab * model.hidden_size * narrow, norm),
        backward_workspace=0,
        weight_workspace=0,
    )


# -- stages -------------------------------------------------------------------------------------------------------


class StageBytes(NamedTuple):
    """Bytes of one micro-batch on a rank of a stage, or of some of its layers, and what its actions use besides.

    entry: the input. kept: from forward to backward, input included, and targets in the last stage. again: what
    RECOMPUTE adds to it. stash: from an input backward to the weight part. output: the result, and likewise the
    gradient that comes back for it.
    """

    entry: int
    kept: int
    again: int
    stash: int
    output: int
    forward_workspace: int
    backward_workspace: int
    weight_workspace: int


@lru_cache(maxsize=65536)
def stage_bytes(shape: RankShape, layers: Span, recompute: str) -> StageBytes:
    """Of the layers [a, b) in a stage that recomputes as told."""
    model = shape.workload.model
    total = _NOTHING
    for layer in range(*layers):
        total = total + layer_bytes(shape, layer_kind(model, layer))
    first, last = layers[0] == 0, layers[1] == model.layers + 2
    entry = shape.token_bytes if first else shape.boundary_bytes
    targets = shape.token_bytes + shape.rows * 8 if last else 0
    # The head does not keep its input, so that a stage of nothing else has the input besides.
    whole = total.kept + targets + (entry if layers[0] == model.layers + 1 else 0)
    kept = {"none": whole, "selective": whole - total.core, "full": entry + targets}[recompute]
    return StageBytes(
        entry=entry,
        kept=kept,
        again=whole - kept,
        stash=total.stash,
        output=0 if last else shape.boundary_bytes,
        forward_workspace=total.forward_workspace,
        backward_workspace=total.backward_workspace,
        weight_workspace=total.weight_workspace,
    )


def apart_bytes(workload: Workload, size: int) -> int:
    """Bytes that an updater needs besides for each element of a slice that does not lie in one piece: a gradient, and
    a master copy where weights are wide and so have none, in one piece."""
    wide = gradient_bytes(workload.precision)
    return wide + (wide if size == wide else 0)


def cut_inside_elements(shape: RankShape, layers: Span) -> int:
    """Elements of weights whose cut axis is not their first: slices of those do not lie in one piece."""
    return held_elements(shape.workload.model, shape.share, layers)[1]


class RankUse(NamedTuple):
    """A rank's use, the optimizer and what is exchanged left out, its elements (all, and those cut inside), bytes of
    one, and whether they lie on the host."""

    use: MemoryUse
    elements: int
    cut_inside: int
    size: int
    host: bool

    def __add__(self, other: RankUse) -> RankUse:  # type: ignore[override]  # stages of one device
        """Of both stages. One ends or begins while the other holds all that it may."""
        use = self.use + other.use
        return self._replace(
            use=replace(use, one=use.activations),
            elements=self.elements + other.elements,
            cut_inside=self.cut_inside + other.cut_inside,
        )


def rank_use(
    compute: ComputeModel,
    pipeline: PipelinePlace,
    stage: StagePlace,
    rank: RankPlace,
    shape: RankShape,
    ahead: int,
) -> RankUse:
    """Of one stage, whoever updates what it holds; `ahead` is how many micro-batches the stage before may have in
    flight."""
    elements = compute.stage_parameters(rank.share, stage.layers)
    found = stage_bytes(shape, stage.layers, stage.recompute)
    held = min(stage.in_flight, pipeline.micro_batches)
    waiting = min(held, _WAITING.get(pipeline.schedule, held))
    # Forward's result stays as long as its graph, but where another forward will make it again.
    each = found.kept + (0 if stage.recompute == "full" else found.output)
    apart = each
    if waiting:  # its input, the input's gradient and targets stay beside the operands
        passing = stage_bytes(shape, stage.layers, "full").kept
        apart = max(each, found.stash + passing + (0 if stage.layers[0] == 0 else found.entry))
    again = found.again + (found.output if stage.recompute == "full" else 0)
    ways = (0 if stage.layers[0] == 0 else 1) + (1 if found.output else 0)
    host = on_host(compute, rank.device)
    sent = ways * shape.boundary_bytes if host else 0
    # Gradients that were sent lie here until the stage before tells that it has them, by an activation that it sends
    # after: who is far ahead sends none for a while.
    untold = max(0, ahead - held) * shape.boundary_bytes if host else 0
    use = MemoryUse(
        weights=elements * shape.size,
        gradients=elements * gradient_bytes(shape.workload.precision),
        optimizer=0,
        activations=held * (each + sent) + waiting * (apart - each) + again + untold,
        one=apart + sent + again,
        buffers=ways * shape.boundary_bytes * (_RECEIVE_DEPTH + _TAKEN + (0 if host else _SEND_BUFFERS)),
        workspace=max(found.forward_workspace, found.backward_workspace),
        reduction=0,
    )
    return RankUse(use, elements, cut_inside_elements(shape, stage.layers), shape.size, host)


def _exchanged(
    found: RankUse, workload: Workload, owned: int | None, incoming: int | None, joint: int, apart: int | None
) -> MemoryUse:
    """Optimizer state of `owned` elements (None: of all), `apart` of them in slices that do not lie in one piece (None:
    as many of those that may), and messages with others' gradients (`incoming` elements) and with the new weights that
    others update; or collectives of `joint` elements, what pads their shares left out.

    An accelerator takes the ones before it takes the others. On a host there are buffers for all that is to come, and
    for what goes: gradients of what others update, and new weights to those whose gradients came.
    """
    wide = gradient_bytes(workload.precision)
    mine = found.elements if owned is None else owned
    others = 0 if incoming is None else found.elements - mine
    come = incoming or 0
    if apart is None:
        apart = found.cut_inside * mine // max(1, found.elements) if mine < found.elements else 0
    on_device = max(come * wide, joint * wide, others * found.size)
    return MemoryUse(
        weights=0,
        gradients=0,
        optimizer=mine * state_bytes(workload.precision) + apart * apart_bytes(workload, found.size),
        activations=0,
        one=0,
        buffers=come * found.size if found.host else 0,
        workspace=0,
        reduction=come * wide + others * (found.size + wide) if found.host else on_device,
    )


def device_memory(
    compute: ComputeModel,
    layout: Layout,
    owned_elements: Mapping[int, int] | None = None,
    incoming_elements: Mapping[int, int] | None = None,
    joint_elements: Mapping[int, int] = MappingProxyType({}),
    apart_elements: Mapping[int, int] | None = None,
) -> dict[int, MemoryUse]:
    """Peak memory of every used device.

    `owned_elements` and the others (device -> count) come from the ownership table; without them a device is taken to
    update all that it holds, which is the most it can be given, and to wait for no one.
    """
    uses = rank_uses(compute, layout)
    return with_updates(compute, uses, owned_elements, incoming_elements, joint_elements, apart_elements)


def rank_uses(compute: ComputeModel, layout: Layout) -> dict[int, RankUse]:
    """Of every used device, whoever updates what it holds."""
    found: dict[int, RankUse] = {}
    known: dict[tuple[object, ...], RankUse] = {}  # alike ranks of alike stages
    for pipeline in layout.pipelines:
        ahead = 0
        for stage in pipeline.stages:
            held = (
                *(stage.layers, stage.recompute, stage.in_flight, ahead),
                *(pipeline.schedule, pipeline.micro_batches),
            )
            for replica in stage.replicas:
                for member, rank in enumerate(replica.ranks):
                    shape = rank_shape(compute, replica, member)
                    key = (
                        *(held, shape.share, shape.rows, shape.size, shape.members, member),
                        *(shape.largest_vocab, on_host(compute, rank.device)),
                    )
                    if key not in known:
                        known[key] = rank_use(compute, pipeline, stage, rank, shape, ahead)
                    one = known[key]
                    other = found.get(rank.device)
                    found[rank.device] = one if other is None else other + one
            ahead = min(stage.in_flight, pipeline.micro_batches)
    return found


def with_updates(
    compute: ComputeModel,
    uses: Mapping[int, RankUse],
    owned_elements: Mapping[int, int] | None = None,
    incoming_elements: Mapping[int, int] | None = None,
    joint_elements: Mapping[int, int] = MappingProxyType({}),
    apart_elements: Mapping[int, int] | None = None,
) -> dict[int, MemoryUse]:
    """Peak memory of devices that use `uses` beside what they update (see `device_memory`)."""
    return {
        device: one.use
        + _exchanged(
            one,
            compute.workload,
            None if owned_elements is None else owned_elements.get(device, 0),
            None if incoming_elements is None else incoming_elements.get(device, 0),
            joint_elements.get(device, 0) if compute.graph.has_collectives(device) else 0,
            None if apart_elements is None else apart_elements.get(device, 0),
        )
        for device, one in uses.items()
    }
