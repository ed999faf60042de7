"""What a Llama- or GPT-like model is made of: its parameters and, per layer, the operations of forward and backward.

Layer 0 is the embedding, 1 to L the decoders, L + 1 the final norm and head. Names are Hugging Face's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from hethub.specs.layout import Share, Span
from hethub.specs.workload import Model
from hethub.timeline.record import Kind

__all__ = [
    "BYTES",
    "LayerKind",
    "Operation",
    "Parameter",
    "Segment",
    "Work",
    "held_elements",
    "layer_kind",
    "layer_parameters",
    "layer_segments",
    "logit_chunk_tokens",
    "model_flops_per_token",
    "model_parameters",
    "parameter_span",
    "shard_tokens",
]

BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}

LayerKind = Literal["embedding", "decoder", "head"]
Cut = Literal["none", "heads", "kv", "ffn", "vocab"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight tensor: tensor parallelism cuts `axis` by `cut` (in units of `unit` elements); `layers` are
    the places it stands in (two for a tied embedding)."""

    name: str
    shape: tuple[int, ...]
    cut: Cut
    axis: int
    unit: int
    layers: tuple[int, ...]

    @property
    def elements_per_index(self) -> int:
        """Elements behind one index of the cut axis."""
        total = 1
        for axis, size in enumerate(self.shape):
            if axis != self.axis:
                total *= size
        return total


def layer_kind(model: Model, layer: int) -> LayerKind:
    """The kind of layer `layer` (0 to L + 1)."""
    if layer == 0:
        return "embedding"
    return "head" if layer == model.layers + 1 else "decoder"


def _gpt_decoder_parameters(model: Model, layer: int) -> list[Parameter]:
    """A GPT decoder, names of OPT: every product has a bias, every norm too; biases of row products are not cut."""
    prefix = f"model.decoder.layers.{layer - 1}."
    hidden, unit, at = model.hidden_size, model.head_dim, (layer,)
    width = model.heads * unit
    found = []
    for norm in ("self_attn_layer_norm", "final_layer_norm"):
        for part in ("weight", "bias"):
            found.append(Parameter(f"{prefix}{norm}.{part}", (hidden,), "none", 0, 1, at))
    for name in ("q_proj", "k_proj", "v_proj"):
        found.append(Parameter(f"{prefix}self_attn.{name}.weight", (width, hidden), "heads", 0, unit, at))
        found.append(Parameter(f"{prefix}self_attn.{name}.bias", (width,), "heads", 0, unit, at))
    found += [
        Parameter(prefix + "self_attn.out_proj.weight", (hidden, width), "heads", 1, unit, at),
        Parameter(prefix + "self_attn.out_proj.bias", (hidden,), "none", 0, 1, at),
        Parameter(prefix + "fc1.weight", (model.ffn_size, hidden), "ffn", 0, 1, at),
        Parameter(prefix + "fc1.bias", (model.ffn_size,), "ffn", 0, 1, at),
        Parameter(prefix + "fc2.weight", (hidden, model.ffn_size), "ffn", 1, 1, at),
        Parameter(prefix + "fc2.bias", (hidden,), "none", 0, 1, at),
    ]
    return found


def _decoder_parameters(model: Model, layer: int) -> list[Parameter]:
    if model.family == "gpt":
        return _gpt_decoder_parameters(model, layer)
    prefix = f"model.layers.{layer - 1}."
    hidden, unit, at = model.hidden_size, model.head_dim, (layer,)
    query, key = (model.heads * unit, hidden), (model.kv_heads * unit, hidden)
    up = (model.ffn_size, hidden)
    return [
        Parameter(prefix + "input_layernorm.weight", (hidden,), "none", 0, 1, at),
        Parameter(prefix + "self_attn.q_proj.weight", query, "heads", 0, unit, at),
        Parameter(prefix + "self_attn.k_proj.weight", key, "kv", 0, unit, at),
        Parameter(prefix + "self_attn.v_proj.weight", key, "kv", 0, unit, at),
        Parameter(prefix + "self_attn.o_proj.weight", query[::-1], "heads", 1, unit, at),
        Parameter(prefix + "post_attention_layernorm.weight", (hidden,), "none", 0, 1, at),
        Parameter(prefix + "mlp.gate_proj.weight", up, "ffn", 0, 1, at),
        Parameter(prefix + "mlp.up_proj.weight", up, "ffn", 0, 1, at),
        Parameter(prefix + "mlp.down_proj.weight", up[::-1], "ffn", 1, 1, at),
    ]


@lru_cache(maxsize=32)
def model_parameters(model: Model) -> tuple[Parameter, ...]:
    """Every parameter once, in layer order; a tied head is the embedding's entry with two layers."""
    hidden, last = model.hidden_size, model.layers + 1
    table = (model.vocab_size, hidden)
    places = (0, last) if model.tied else (0,)
    found = [Parameter("model.embed_tokens.weight", table, "vocab", 0, 1, places)]
    if model.positions:
        positions = (model.positions, hidden)
        found.append(Parameter("model.embed_positions.weight", positions, "none", 0, 1, (0,)))
    for layer in range(1, last):
        found.extend(_decoder_parameters(model, layer))
    found.append(Parameter("model.norm.weight", (hidden,), "none", 0, 1, (last,)))
    if model.family == "gpt":
        found.append(Parameter("model.norm.bias", (hidden,), "none", 0, 1, (last,)))
    if not model.tied:
        found.append(Parameter("lm_head.weight", table, "vocab", 0, 1, (last,)))
    return tuple(found)


@lru_cache(maxsize=4096)
def layer_parameters(model: Model, layer: int) -> tuple[Parameter, ...]:
    """The parameters that layer `layer` uses."""
    return tuple(p for p in model_parameters(model) if layer in p.layers)


def parameter_span(parameter: Parameter, share: Share) -> Span:
    """What a rank with `share` holds of the parameter's cut axis, half-open, in elements."""
    if parameter.cut == "none":
        return (0, parameter.shape[0])
    start, stop = getattr(share, parameter.cut)
    return (start * parameter.unit, stop * parameter.unit)


@lru_cache(maxsize=1 << 16)
def held_elements(model: Model, share: Share, layers: Span) -> tuple[int, int]:
    """(Parameter elements that a rank holds of `layers`, a tied table that stands twice counted once; elements of
    weights whose cut axis is not their first: slices of those do not lie in one piece)."""
    seen: dict[str, int] = {}
    inside = 0
    for layer in range(*layers):
        for parameter in layer_parameters(model, layer):
            start, stop = parameter_span(parameter, share)
            seen[parameter.name] = (stop - start) * parameter.elements_per_index
            inside += seen[parameter.name] if parameter.axis else 0
    return sum(seen.values()), inside


_CHUNK_LOGITS = 2**22  # 16 MiB in fp32: large enough for products at full speed, small beside the activations


def logit_chunk_tokens(tokens: int, vocab_share: int) -> int:
    """Tokens whose logits exist at once in the head: at most a quarter of `tokens`, at most 2^22 logits, at least 1.

    `vocab_share` is the largest share of vocabulary rows in the group, so that all members cut alike.
    """
    return max(1, min(tokens // 4, _CHUNK_LOGITS // max(1, vocab_share)))


class Operation(NamedTuple):
    """Work of one operator: floating-point operations and bytes moved to and from device memory.

    `weighted` marks a product with a weight: its backward is one product for the input's gradient and one for the
    weight's.
    """

    flops: float
    bytes: float
    weighted: bool = False


class Segment(NamedTuple):
    """What one member of a tensor-parallel group does between two points where the group meets, and the collectives
    there (none in a group of one).

    `exchanges` all-gathers and reduce-scatters along the sequence move shards of `shard_bytes` (one member's, padded:
    see `shard_tokens`); `chunks` all-gathers more join the statistics of a chunk of logits, `chunk_bytes` a member.
    """

    operations: tuple[Operation, ...]
    exchanges: int = 0
    shard_bytes: int = 0
    chunks: int = 0
    chunk_bytes: int = 0


class Work(NamedTuple):
    """What an action does to a layer: `kind`, in a stage that recomputes as `recompute` says, on one of `members`
    ranks of which the largest vocabulary share is `largest_vocab`; without `training` nothing is kept and the head
    only gives the loss."""

    kind: Kind
    recompute: str = "none"
    members: int = 1
    largest_vocab: int = 0
    training: bool = True

    @property
    def differentiates_head(self) -> bool:
        """Whether the head's forward also makes its gradients: in the pass that backward will follow, which is the
        second one of a stage that recomputes everything."""
        last_pass = Kind.RECOMPUTE if self.recompute == "full" else Kind.FORWARD
        return self.training and self.kind == last_pass


def shard_tokens(seq: int, members: int) -> int:
    """Tokens of a row in a member's shard, padded: ceil(seq / members)."""
    return -(-seq // members)


def _matmul(tokens: int, inputs: int, outputs: int, size: int) -> Operation:
    """(tokens, inputs) x (inputs, outputs): 2 flops per multiply-add; operands read, the result written."""
    return Operation(
        2.0 * tokens * inputs * outputs,
        size * (tokens * inputs + inputs * outputs + tokens * outputs),
        weighted=True,
    )


def _touch(elements: float, size: int) -> Operation:
    """An elementwise operator that is bound by memory traffic."""
    return Operation(0.0, elements * size)


def _attention_core(model: Model, share: Share, rows: int, seq: int, size: int) -> Operation:
    """Scores and their mix of values: what selective recomputation does again.

    Scores count in full, seq x seq (the usual MFU convention; a causal kernel that skips half of them runs at a lower
    efficiency than a plain product, which about cancels).
    """
    heads, kv = share.heads[1] - share.heads[0], share.kv[1] - share.kv[0]
    return Operation(
        4.0 * rows * heads * seq * seq * model.head_dim,
        2.0 * size * rows * seq * (heads + kv) * model.head_dim,
    )


def _decoder_forward(
    model: Model, share: Share, rows: int, *, seq: int, size: int, members: int
) -> tuple[tuple[Operation, ...], tuple[Operation, ...]]:
    """Operators of the attention and the feed-forward half; norms and residuals see a member's shard of the tokens
    (Korthikanti et al., "Reducing activation recomputation", arXiv 2205.05198)."""
    tokens, hidden = rows * seq, model.hidden_size
    heads, kv = share.heads[1] - share.heads[0], share.kv[1] - share.kv[0]
    width, kv_width, ffn = heads * model.head_dim, kv * model.head_dim, share.ffn[1] - share.ffn[0]
    shard = rows * shard_tokens(seq, members)
    norm, residual = _touch(2 * shard * hidden, size), _touch(3 * shard * hidden, size)
    gated = model.family == "llama"
    positions = (_touch(2 * tokens * (width + kv_width), size),) if gated else ()  # rotary ones
    attention = (
        norm,
        _matmul(tokens, hidden, width + 2 * kv_width, size),
        *positions,
        _attention_core(model, share, rows, seq, size),
        _matmul(tokens, width, hidden, size),
        residual,
    )
    feed_forward = (
        norm,
        _matmul(tokens, hidden, 2 * ffn if gated else ffn, size),
        _touch((3 if gated else 2) * tokens * ffn, size),
        _matmul(tokens, ffn, hidden, size),
        residual,
    )
    return attention, feed_forward


def _decoder_segments(
    model: Model, share: Share, rows: int, *, seq: int, size: int, work: Work
) -> tuple[Segment, ...]:
    """Each half gathers the tokens' shards before its column products and scatters sums after its row products;
    backward mirrors both."""
    if work.kind == Kind.RECOMPUTE and work.recompute == "selective":
        return (Segment((_attention_core(model, share, rows, seq, size),)),)
    halves = _decoder_forward(model, share, rows, seq=seq, size=size, members=work.members)
    if work.kind == Kind.BACKWARD_WEIGHT:
        return tuple(Segment(tuple(o for o in half if o.weighted)) for half in reversed(halves))
    if work.kind in (Kind.BACKWARD, Kind.BACKWARD_INPUT):
        split = work.kind == Kind.BACKWARD_INPUT
        halves = (
            tuple(_backward(o, split=split) for o in halves[1]),
            tuple(_backward(o, split=split) for o in halves[0]),
        )
    if work.members == 1:
        return tuple(Segment(half) for half in halves)
    shard_bytes = rows * shard_tokens(seq, work.members) * model.hidden_size * size
    return tuple(Segment(half, exchanges=2, shard_bytes=shard_bytes) for half in halves)


def _embedding_segments(model: Model, rows: int, *, seq: int, size: int, work: Work) -> tuple[Segment, ...]:
    """Forward looks up and scatters sums; backward gathers the gradient and adds it into the table's."""
    touch = (_touch(2 * rows * seq * model.hidden_size, size),)
    if work.kind == Kind.BACKWARD_WEIGHT:
        return (Segment(touch),)
    operations = () if work.kind == Kind.BACKWARD_INPUT else touch
    if work.members == 1:
        return (Segment(operations),)
    shard_bytes = rows * shard_tokens(seq, work.members) * model.hidden_size * size
    return (Segment(operations, exchanges=1, shard_bytes=shard_bytes),)


def _head_segments(
    model: Model, share: Share, rows: int, *, seq: int, size: int, work: Work
) -> tuple[Segment, ...]:
    """Norm, product and cross-entropy, chunk by chunk (`logit_chunk_tokens`); in training all gradients follow in the
    same pass, while a chunk's logits are there, and backward has nothing left to do.

    A group gathers the hidden states, per chunk everyone's largest logit, sum of exponentials and chosen logit, and
    scatters the hidden states' gradient.
    """
    if work.kind not in (Kind.FORWARD, Kind.RECOMPUTE):
        return (Segment(()),)
    tokens, hidden, vocab = rows * seq, model.hidden_size, share.vocab[1] - share.vocab[0]
    shard, wide = rows * shard_tokens(seq, work.members), max(size, 4)
    norm, product = _touch(2 * shard * hidden, size), _matmul(tokens, hidden, vocab, size)
    # read the logits, write and read their exponentials; for the gradient read and write them once more
    operations: tuple[Operation, ...] = (norm, product, _touch(3 * tokens * vocab, wide))
    if work.differentiates_head:
        gradient = (_touch(2 * tokens * vocab, wide), product, product, _backward(norm, split=False))
        operations += gradient
    if work.members == 1:
        return (Segment(operations),)
    chunk = logit_chunk_tokens(tokens, work.largest_vocab or vocab)
    return (
        Segment(
            operations,
            exchanges=2 if work.differentiates_head else 1,
            shard_bytes=shard * hidden * size,
            chunks=-(-tokens // chunk),
            chunk_bytes=3 * min(chunk, tokens) * wide,
        ),
    )


@lru_cache(maxsize=1 << 14)
def layer_segments(
    model: Model, kind: LayerKind, share: Share, rows: int, *, seq: int, size: int, work: Work
) -> tuple[Segment, ...]:
    """Work of one layer for one rank with `rows` sequences of `seq` tokens, `size` bytes per element.

    BACKWARD of a decoder does every operator twice (input and weight gradient) and moves twice the bytes, segments
    reversed. BACKWARD_INPUT is BACKWARD without the weights' products, BACKWARD_WEIGHT is those alone, without
    collectives. RECOMPUTE is FORWARD again in a stage that recomputes "full", the attention core in one that does
    "selective", and nothing in others.
    """
    if work.kind == Kind.RECOMPUTE and (
        work.recompute == "none" or (work.recompute == "selective" and kind != "decoder")
    ):
        return ()
    if kind == "embedding":
        return _embedding_segments(model, rows, seq=seq, size=size, work=work)
    segments = _head_segments if kind == "head" else _decoder_segments
    return segments(model, share, rows, seq=seq, size=size, work=work)


def _backward(operation: Operation, *, split: bool) -> Operation:
    """An operator's backward; with `split` without its weight's gradient."""
    times = 1 if split and operation.weighted else 2
    return Operation(times * operation.flops, times * operation.bytes, operation.weighted)


def model_flops_per_token(model: Model, seq: int) -> float:
    """FLOPs of forward and backward per token, recomputation not counted: 3 x the forward products."""
    whole, work = Share.whole(model), Work(Kind.FORWARD, training=False)
    per_row = 0.0
    for kind, count in (("embedding", 1), ("decoder", model.layers), ("head", 1)):
        for segment in layer_segments(model, kind, whole, 1, seq=seq, size=2, work=work):
            per_row += count * sum(o.flops for o in segment.operations)
    return 3 * per_row / seq
