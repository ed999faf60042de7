"""A Llama-like transformer, cut into stages and tensor-parallel shares; the whole model is the stage of all layers.

Shapes: B rows, S tokens, D hidden, E head_dim. Root-mean-square norms, rotary positions, grouped-query causal
attention, SwiGLU, tied or untied head. Tensor parallelism as in Shoeybi et al., "Megatron-LM" (arXiv 1909.08053),
columns first, rows second, with sequence parallelism as in Korthikanti et al. (arXiv 2205.05198): between the products
every member holds its own tokens only, an all-gather comes before the columns and a reduce-scatter after the rows, and
backward mirrors both. Shares of heads, columns and vocabulary may be uneven.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hethub.cost.shapes import (
    Parameter,
    layer_kind,
    layer_parameters,
    logit_chunk_tokens,
    parameter_span,
)
from hethub.launch.gradients import WeightGradients, wide_dtype
from hethub.launch.groups import SoloGroup, TensorGroup
from hethub.launch.heap import Allocate, in_private
from hethub.launch.kernels import Attention, Block, Cell, Embedding, FeedForward, HeadLoss, Heads
from hethub.specs.layout import Share, Span
from hethub.specs.workload import Model

__all__ = ["SoloGroup", "StageModel", "TensorGroup", "WeightSource"]

WeightSource = Callable[[Parameter, Span], Tensor]

# Weights that multiply the same input lie one after the other in one storage, so that one product serves them all.
_PACKS = (
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
)


def _pack_of(name: str) -> tuple[str, ...]:
    """The names of the pack that a parameter belongs to; itself alone where it stands alone."""
    for pack in _PACKS:
        for part in pack:
            if name.endswith("." + part):
                return tuple(name.removesuffix(part) + other for other in pack)
    return (name,)


def _rotary_table(model: Model, seq: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, 1, E / 2) of Su et al., "RoFormer"; Llama 3's frequency scaling where the model has it."""
    steps = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    frequency = 1.0 / model.rope_theta**steps
    scaling = model.rope_scaling
    if scaling is not None:
        length = 2 * math.pi / frequency
        low = scaling.original_max_position_embeddings / scaling.low_freq_factor
        high = scaling.original_max_position_embeddings / scaling.high_freq_factor
        between = (scaling.original_max_position_embeddings / length - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        slow = frequency / scaling.factor
        smooth = (1 - between) * slow + between * frequency
        frequency = torch.where(length > low, slow, torch.where(length < high, frequency, smooth))
    angle = torch.outer(torch.arange(seq, dtype=torch.float64), frequency)[:, None]
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


class StageModel:
    """The layers [a, b) of a model as one tensor-parallel rank holds them.

    `parameters` maps Hugging Face names to this rank's shards: leaf tensors that require gradients. Those of a pack are
    views of one storage, so change them in place and never replace them (an embedding or head may be replaced). With
    `sink` set, backward adds weight gradients into it; without, into `.grad` as usual.

    In a group of n members, member m's activations are (B, s, D), the tokens `sequence_span(S, n, m)` of every row.
    Tokens, targets and weights are always whole. Backward is taken once per forward.

    What autograd keeps, in elements of the stage's dtype unless said (W query columns, KW key columns, F feed-forward
    columns, V vocabulary rows of this rank; "wide" is fp32, or fp64 in an fp64 stage):
    - a decoder, per token of the shard: 2 D (the inputs of its halves) and 2 wide scales; per token of the whole
      sequence: W + 2 KW (packed queries, keys and values) + 2 F (gate and up), in a group also 2 D (gathered inputs of
      the columns); and unless recompute is selective, W (the core's result) and one wide log-sum a query head;
    - the embedding: 8 bytes a token of the whole sequence;
    - the head: D per token of the shard (the input's gradient, there from forward on), nothing else when a sink and
      a loss_scale are given; else the weights' gradients too.
    While a backward's products are deferred, each decoder holds per token of the whole sequence its products' operands:
    4 D + 2 W + 2 KW + 3 F. The head's forward holds, for a moment, 2 D per token of the whole sequence and
    `logit_chunk_tokens` x V logits, in the stage's dtype and, where that is not wide, wide.
    """

    def __init__(
        self,
        model: Model,
        layers: Span,
        share: Share,
        *,
        sequence_length: int,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightSource,
        group: TensorGroup | None = None,
        recompute: str = "none",
        held: Mapping[str, Tensor] | None = None,
        allocate: Allocate = in_private,
    ) -> None:
        """`recompute` is none or selective here (the attention core is done again); full is for the caller to do.

        `held` are parameters that the device has already in another stage: a tied table, which is one tensor.
        `allocate` gives the memory of the weights.
        """
        self.model = model
        self.layers = layers
        self.share = share
        self.group: TensorGroup = SoloGroup() if group is None else group
        self.recompute = recompute
        self.sink: WeightGradients | None = None
        self.parameters: dict[str, Tensor] = {}
        self.packs: list[tuple[str, ...]] = []
        self._packed: dict[tuple[str, ...], Tensor] = {}
        shards: dict[tuple[str, ...], list[Tensor]] = {}
        for layer in range(*layers):
            here = {p.name: p for p in layer_parameters(model, layer)}
            for names in dict.fromkeys(_pack_of(name) for name in here):
                if held is not None and names[0] in held:
                    self.packs.append(names)
                    self.parameters[names[0]] = held[names[0]]
                elif names not in shards:
                    parts = [weights(here[n], parameter_span(here[n], share)) for n in names]
                    shards[names] = [part.to(device, dtype) for part in parts]
        self.dtype = dtype
        self._add_packs(shards, allocate)
        self.first = layers[0] == 0
        self.last = layers[1] == model.layers + 2
        self.sequence_length = sequence_length
        cos, sin = _rotary_table(model, sequence_length, dtype, device)
        heads, kv = (span[1] - span[0] for span in (share.heads, share.kv))
        self._heads = Heads(heads, kv, model.head_dim, cos, sin)
        self._largest_vocab: int | None = None

    def _add_packs(self, shards: dict[tuple[str, ...], list[Tensor]], allocate: Allocate) -> None:
        """All weights lie one after the other in one storage, so that neighbours can be sent as one."""
        if not shards:
            return
        flat = [part.flatten() for parts in shards.values() for part in parts]
        arena = allocate(sum(len(part) for part in flat), self.dtype, flat[0].device)
        torch.cat(flat, out=arena)
        at = 0
        for names, parts in shards.items():
            self.packs.append(names)
            rows, inner = [len(part) for part in parts], parts[0].shape[1:]
            size = sum(part.numel() for part in parts)
            # `.data`: a version counter each, so that new weights may come into one while another is in use.
            packed = self._packed[names] = arena[at : at + size].view(sum(rows), *inner).data
            at += size
            for name, part in zip(names, packed.split(rows), strict=True):
                self.parameters[name] = part.data.requires_grad_()

    def forward(self, entry: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Run the stage: `forward_layers` over all of its layers."""
        return self.forward_layers(self.layers, entry, targets, weights)

    def forward_layers(
        self,
        layers: Span,
        x: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        loss_scale: float | None = None,
        cells: list[Cell] | None = None,
    ) -> Tensor:
        """Run the layers [a, b) of this stage.

        x: token ids (B, S) before the embedding, else activations (B, s, D). The head wants targets (B, S) and weights
        of rows (B,) or tokens (B, S), and returns the weighted sum of losses (scalar, fp64, the same on every member);
        else the result is (B, s, D).

        With `loss_scale` the head takes the gradients of loss x loss_scale in forward already, the weights' straight
        into the sink, and the loss's backward must be called with gradient 1. Without it any gradient will do.
        `cells` collects one cell a decoder under selective recomputation: `cell.fill()` does its attention core again
        ahead of backward, which otherwise does so itself. Raises ValueError for a head without targets or weights.
        """
        for layer in range(*layers):
            kind = layer_kind(self.model, layer)
            if kind == "embedding":
                x = self._embed(x)
            elif kind == "decoder":
                x = self._decode(x, f"model.layers.{layer - 1}.", cells)
            else:
                if targets is None or weights is None:
                    raise ValueError("the last stage needs targets and weights")
                return self._loss(x, targets, weights, loss_scale)
        return x

    def _block(self, *names: str) -> Block:
        packs = tuple(_pack_of(name) for name in names)
        columns = self._packed[packs[-2]] if len(packs) > 2 else self.parameters[names[-1]]
        return Block(packs, columns, self.group, self.sink, self.sequence_length, self.model.norm_epsilon)

    def _embed(self, tokens: Tensor) -> Tensor:
        name = "model.embed_tokens.weight"
        result: Tensor = Embedding.apply(
            self.parameters[name], tokens, self._block(name), self.share.vocab[0]
        )
        return result

    def _decode(self, x: Tensor, prefix: str, cells: list[Cell] | None) -> Tensor:
        w = self.parameters
        norm, output = prefix + "input_layernorm.weight", prefix + "self_attn.o_proj.weight"
        query, key, value = (prefix + f"self_attn.{name}_proj.weight" for name in "qkv")
        if self.recompute != "selective":
            cells = None
        elif cells is None:
            cells = []
        x = Attention.apply(
            x,
            w[norm],
            w[query],
            w[key],
            w[value],
            w[output],
            self._block(norm, query, output),
            self._heads,
            cells,
            torch.is_grad_enabled(),
        )
        norm, down = prefix + "post_attention_layernorm.weight", prefix + "mlp.down_proj.weight"
        gate, up = (prefix + f"mlp.{name}_proj.weight" for name in ("gate", "up"))
        result: Tensor = FeedForward.apply(x, w[norm], w[gate], w[up], w[down], self._block(norm, gate, down))
        return result

    def _loss(self, x: Tensor, targets: Tensor, weights: Tensor, loss_scale: float | None) -> Tensor:
        norm = "model.norm.weight"
        head = "model.embed_tokens.weight" if self.model.tied else "lm_head.weight"
        each = weights.to(wide_dtype(self.dtype))
        if each.dim() == 1:
            each = each[:, None].expand(targets.shape)
        result: Tensor = HeadLoss.apply(
            x,
            self.parameters[norm],
            self.parameters[head],
            self._block(norm, head),
            targets.flatten(),
            each.flatten(),
            self.share.vocab[0],
            logit_chunk_tokens(targets.numel(), self._group_vocab(len(self.parameters[head]), x.device)),
            loss_scale,
            torch.is_grad_enabled(),
        )
        return result

    def _group_vocab(self, own: int, device: torch.device) -> int:
        """The largest vocabulary share in the group, asked once: all members must cut their tokens alike."""
        if self._largest_vocab is None:
            wanted = torch.tensor([own], dtype=torch.float64, device=device)
            self._largest_vocab = int(self.group.max(wanted))
        return self._largest_vocab
