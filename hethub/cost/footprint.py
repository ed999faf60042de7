"""Peak memory of a stage under another engine (unfused attention, fp32 as measured; formulas: docs/cost-model.md)."""

from __future__ import annotations

from dataclasses import dataclass

from hethub.cost.engines import EngineRun, RunStage
from hethub.cost.shapes import BYTES, layer_parameters, parameter_span
from hethub.specs.layout import Share
from hethub.specs.workload import Model

__all__ = ["Footprint", "rank_parameters", "rank_share", "stage_footprint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes on one rank of a stage at its peak, by what they are for."""

    persistent_bytes: float
    activation_bytes: float
    workspace_bytes: float

    @property
    def allocated_bytes(self) -> float:
        """What the framework's allocator gives out; context, libraries and its reserve come on top."""
        return self.persistent_bytes + self.activation_bytes + self.workspace_bytes


def rank_share(model: Model, tensor_parallel: int) -> Share:
    """The first rank's share under an even cut."""
    return Share(
        (0, model.heads // tensor_parallel),
        (0, model.kv_heads // tensor_parallel),
        (0, model.ffn_size // tensor_parallel),
        (0, -(-model.vocab_size // tensor_parallel)),
    )


def rank_parameters(model: Model, layer: int, tensor_parallel: int) -> int:
    """Parameter elements of one layer on one rank."""
    share, total = rank_share(model, tensor_parallel), 0
    for parameter in layer_parameters(model, layer):
        start, stop = parameter_span(parameter, share)
        total += (stop - start) * parameter.elements_per_index
    return total


def stage_footprint(run: EngineRun, stage: int) -> Footprint:
    """Peak of a rank of stage `stage`: all micro-batches in flight, and one layer's backward at work."""
    model, place = run.model, run.stages[stage]
    embedding, head = place.layers[0] == 0, place.layers[1] == model.layers + 2
    attention, feed_forward = _halves(run, place)
    unit = run.sequence_length * model.hidden_size * run.micro_batch * BYTES[run.dtype]
    kept = attention * _attention_bytes(run, unit) + feed_forward * _feed_forward_bytes(run, unit)
    logits = _logits_bytes(run)
    copies = run.engine.logit_copies * logits
    kept += unit * embedding + (copies + unit) * head
    # With a head either its backward is the peak, or the last decoder's when the head's tensors are gone.
    decoder = 3 * _scores_bytes(run) + unit
    workspace = max(copies + unit, decoder - copies - unit) if head else decoder
    parameters = _parameters(run, embedding, attention, feed_forward, head)
    return Footprint(
        persistent_bytes=parameters * run.engine.bytes_per_parameter,
        activation_bytes=kept * run.in_flight(stage),
        workspace_bytes=workspace,
    )


def _halves(run: EngineRun, stage: RunStage) -> tuple[int, int]:
    if stage.halves is not None:
        return stage.halves
    decoders = min(stage.layers[1], run.model.layers + 1) - max(stage.layers[0], 1)
    return decoders, decoders


def _scores_bytes(run: EngineRun) -> float:
    """A matrix of sequence x sequence for each of the rank's heads and each row."""
    size = BYTES[run.dtype] * run.micro_batch * run.sequence_length**2
    return size * run.model.heads / run.tensor_parallel


def _logits_bytes(run: EngineRun) -> float:
    size = BYTES[run.dtype] * run.micro_batch * run.sequence_length
    return size * -(-run.model.vocab_size // run.tensor_parallel)


def _attention_bytes(run: EngineRun, unit: float) -> float:
    """Kept by an attention half: norm and residual (1.5 of s x h, whole), query, key, value and context (4, cut), the
    softmax; dropout adds a dropped copy of it and masks of a byte an element."""
    width = BYTES[run.dtype]
    dropped = 1 + 1 / width if run.engine.dropout else 0
    whole = 1.5 + (0.5 + 1 / width if run.engine.dropout else 0)
    return whole * unit + 4 * unit / run.tensor_parallel + (1 + dropped) * _scores_bytes(run)


def _feed_forward_bytes(run: EngineRun, unit: float) -> float:
    """Kept by a feed-forward half: norm and residual, the activation function's output, its input where needed."""
    width = BYTES[run.dtype]
    columns = unit * run.model.ffn_size / run.model.hidden_size / run.tensor_parallel
    whole = 1.5 + (0.5 + 1 / width if run.engine.dropout else 0)
    return whole * unit + (2 if run.engine.keeps_feed_forward_input else 1) * columns


def _parameters(run: EngineRun, embedding: bool, attention: int, feed_forward: int, head: bool) -> float:
    """Elements of a rank; a layer cut in halves gives an attention half a third and a feed-forward half two thirds,
    which is exact up to biases where the feed-forward layer is four times as wide."""
    model, degree = run.model, run.tensor_parallel
    decoder = rank_parameters(model, 1, degree)
    total = decoder * (attention + 2 * feed_forward) / 3
    total += rank_parameters(model, 0, degree) * embedding
    return total + rank_parameters(model, model.layers + 1, degree) * head
