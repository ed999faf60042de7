"""What a Llama-like model is made of: its parameters and, per layer, the operations of forward and backward.

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
    "forward_segments",
    "layer_kind",
    "layer_parameters",
    "layer_segments",
    "logit_chunk_tokens",
    "model_flops_per_token",
    "model_parameters",
    "parameter_span",
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


def _decoder_parameters(model: Model, layer: int) -> list[Parameter]:
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
    for layer in range(1, last):
        found.extend(_decoder_parameters(model, layer))
    found.append(Parameter("model.norm.weight", (hidden,), "none", 0, 1, (last,)))
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
    """Operators between two tensor-parallel collectives, and the bytes of the all-reduce after (0: none)."""

    operations: tuple[Operation, ...]
    all_reduce_bytes: int


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


def forward_segments(
    model: Model, kind: LayerKind, share: Share, rows: int, *, seq: int, size: int
) -> tuple[Segment, ...]:
    """Forward work of one layer for one rank: `rows` sequences of `seq` tokens, `size` bytes per element.

    Attention counts the full seq x seq scores (the usual MFU convention; a causal kernel that skips half of
    them runs at a lower efficiency than a plain product, which about cancels).
    """
    tokens, hidden = rows * seq, model.hidden_size
    heads, kv = share.heads[1] - share.heads[0], share.kv[1] - share.kv[0]
    ffn, vocab = share.ffn[1] - share.ffn[0], share.vocab[1] - share.vocab[0]
    reduced = tokens * hidden * size
    if kind == "embedding":
        return (Segment((_touch(2 * tokens * hidden, size),), reduced),)
    norm = _touch(2 * tokens * hidden, size)
    if kind == "head":
        product = _matmul(tokens, hidden, vocab, size)
        # log-softmax in fp32: read the logits, write and read their exponentials
        return (Segment((norm, product, _touch(3 * tokens * vocab, 4)), 3 * tokens * 4),)
    width, kv_width = heads * model.head_dim, kv * model.head_dim
    scores = Operation(
        4.0 * rows * heads * seq * seq * model.head_dim, size * tokens * (2 * width + 2 * kv_width)
    )
    attention = (
        norm,
        _matmul(tokens, hidden, width + 2 * kv_width, size),
        _touch(2 * tokens * (width + kv_width), size),  # rotary positions
        scores,
        _matmul(tokens, width, hidden, size),
        _touch(3 * tokens * hidden, size),  # residual
    )
    feed_forward = (
        norm,
        _matmul(tokens, hidden, 2 * ffn, size),
        _touch(3 * tokens * ffn, size),
        _matmul(tokens, ffn, hidden, size),
        _touch(3 * tokens * hidden, size),
    )
    return (Segment(attention, reduced), Segment(feed_forward, reduced))


def layer_segments(
    model: Model, kind: LayerKind, share: Share, rows: int, *, seq: int, size: int, work: Kind
) -> tuple[Segment, ...]:
    """Work of one layer for one rank, by the kind of action.

    BACKWARD does every product twice (input and weight gradient) and moves twice the bytes, segments reversed.
    BACKWARD_INPUT is BACKWARD without the weights' products, BACKWARD_WEIGHT is those alone, without collectives.
    RECOMPUTE is FORWARD again. The embedding's backward only adds into its weight gradient and reduces nothing.
    """
    forward = forward_segments(model, kind, share, rows, seq=seq, size=size)
    if work in (Kind.FORWARD, Kind.RECOMPUTE):
        return forward
    if kind == "embedding":
        return (Segment(() if work == Kind.BACKWARD_INPUT else forward[0].operations, 0),)
    if work == Kind.BACKWARD_WEIGHT:
        return tuple(Segment(tuple(o for o in s.operations if o.weighted), 0) for s in reversed(forward))
    reduced = rows * seq * model.hidden_size * size
    split = work == Kind.BACKWARD_INPUT
    return tuple(
        Segment(tuple(_backward(o, split=split) for o in s.operations), reduced) for s in reversed(forward)
    )


def _backward(operation: Operation, *, split: bool) -> Operation:
    """An operator's backward; with `split` without its weight's gradient."""
    times = 1 if split and operation.weighted else 2
    return Operation(times * operation.flops, times * operation.bytes, operation.weighted)


def model_flops_per_token(model: Model, seq: int) -> float:
    """FLOPs of forward and backward per token, recomputation not counted: 3 x the forward products."""
    whole = Share.whole(model)
    per_row = 0.0
    for kind, count in (("embedding", 1), ("decoder", model.layers), ("head", 1)):
        for segment in forward_segments(model, kind, whole, 1, seq=seq, size=2):  # type: ignore[arg-type]
            per_row += count * sum(o.flops for o in segment.operations)
    return 3 * per_row / seq
