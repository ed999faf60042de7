"""A Llama-like transformer, cut into stages and tensor-parallel shares; the whole model is the stage of all layers.

Shapes: B rows, S tokens, D hidden, H heads of this rank, K its key-value heads, E head_dim, F FFN columns, V vocabulary
rows of this rank. Root-mean-square norms, rotary positions, grouped-query causal attention, SwiGLU, tied or untied
head. Tensor parallelism as in Shoeybi et al., "Megatron-LM" (arXiv 1909.08053): columns first, rows second, one
all-reduce after each half in forward and one before it in backward; shares may be uneven.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hethub.cost.shapes import Parameter, layer_kind, layer_parameters, parameter_span
from hethub.specs.layout import Share, Span
from hethub.specs.workload import Model

__all__ = ["SoloGroup", "StageModel", "TensorGroup", "WeightSource"]

WeightSource = Callable[[Parameter, Span], Tensor]


class TensorGroup(Protocol):
    """A tensor-parallel group. Reductions are in place and give every member the same bits."""

    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over members."""
        ...

    def max(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over members."""
        ...


class SoloGroup:
    """A group of one."""

    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


class _Spread(torch.autograd.Function):
    """Forward: the same activations enter every rank's columns. Backward: their gradients add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (ctx.group.sum(grad.contiguous()) if ctx.group.size > 1 else grad), None


class _Join(torch.autograd.Function):
    """Forward: the ranks' partial results add up. Backward: each gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.sum(x.contiguous().clone()) if group.size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich, 2019), keeping x and one scale per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(_wide(x.dtype))
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.to(scale.dtype) * scale
        wide = grad.to(scale.dtype)
        inner = wide * weight.to(scale.dtype)
        grad_x = scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        grad_weight = (wide * normed).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer, 2020), keeping its two inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


class _CrossEntropy(torch.autograd.Function):
    """Weighted sum over tokens of -log softmax(logits)[target], the vocabulary cut over the group.

    logits (T, V) of this rank, `first` its first vocabulary row, targets (T,), weights (T,). Keeps the probabilities.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor, first: int, group: TensorGroup
    ) -> Tensor:
        wide = logits.to(_wide(logits.dtype))
        top = group.max(wide.max(-1).values)
        shifted = wide - top[:, None]
        local = targets - first
        mine = (local >= 0) & (local < logits.shape[1])
        local = local.clamp(0, logits.shape[1] - 1)
        chosen = shifted.gather(1, local[:, None])[:, 0].masked_fill(~mine, 0.0)
        total = group.sum(torch.stack([shifted.exp_().sum(-1), chosen]))
        probabilities = shifted.div_(total[0][:, None])
        ctx.save_for_backward(probabilities, local, mine, weights)
        ctx.dtype = logits.dtype
        return ((total[0].log() - total[1]) * weights).sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, local, mine, weights = ctx.saved_tensors
        result = probabilities.clone()
        result.scatter_add_(1, local[:, None], -mine.to(result.dtype)[:, None])
        result *= (weights * grad)[:, None].to(result.dtype)
        return result.to(ctx.dtype), None, None, None, None


def _rotary_table(model: Model, seq: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (S, E) of Su et al., "RoFormer"; Llama 3's frequency scaling where the model has it."""
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
    angle = torch.outer(torch.arange(seq, dtype=torch.float64), frequency)
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x (B, S, heads, E), halves rotated as Hugging Face's Llama does."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None, :] + turned * sin[:, None, :]


class StageModel:
    """The layers [a, b) of a model as one tensor-parallel rank holds them.

    `parameters` maps Hugging Face names to this rank's shards (leaf tensors that require gradients).
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
    ) -> None:
        self.model = model
        self.layers = layers
        self.share = share
        self.group: TensorGroup = SoloGroup() if group is None else group
        self.parameters: dict[str, Tensor] = {}
        for layer in range(*layers):
            for parameter in layer_parameters(model, layer):
                if parameter.name not in self.parameters:
                    value = weights(parameter, parameter_span(parameter, share)).to(device, dtype)
                    self.parameters[parameter.name] = value.contiguous().requires_grad_()
        self.first = layers[0] == 0
        self.last = layers[1] == model.layers + 2
        self.dtype = dtype
        self._cos, self._sin = _rotary_table(model, sequence_length, dtype, device)

    def forward(self, entry: Tensor, targets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Run the stage.

        entry: token ids (B, S) in the first stage, else activations (B, S, D). The last stage wants targets (B, S)
        and per-row weights (B,), and returns the weighted loss sum (scalar, fp64); others return (B, S, D).
        """
        x = entry
        for layer in range(*self.layers):
            kind = layer_kind(self.model, layer)
            if kind == "embedding":
                x = self._embed(x)
            elif kind == "decoder":
                x = self._decode(x, f"model.layers.{layer - 1}.")
            else:
                if targets is None or weights is None:
                    raise ValueError("the last stage needs targets and weights")
                return self._loss(x, targets, weights)
        return x

    def _embed(self, tokens: Tensor) -> Tensor:
        table = self.parameters["model.embed_tokens.weight"]
        if self.group.size == 1:
            return F.embedding(tokens, table)
        first, stop = self.share.vocab
        mine = (tokens >= first) & (tokens < stop)
        local = F.embedding((tokens - first).clamp(0, stop - first - 1), table)
        result: Tensor = _Join.apply(local * mine[..., None].to(local.dtype), self.group)
        return result

    def _norm(self, x: Tensor, name: str) -> Tensor:
        result: Tensor = _RMSNorm.apply(x, self.parameters[name], self.model.norm_epsilon)
        return result

    def _decode(self, x: Tensor, prefix: str) -> Tensor:
        w = self.parameters
        rows, seq, _ = x.shape
        width = self.model.head_dim
        heads, kv = (span[1] - span[0] for span in (self.share.heads, self.share.kv))
        h = _Spread.apply(self._norm(x, prefix + "input_layernorm.weight"), self.group)
        q = F.linear(h, w[prefix + "self_attn.q_proj.weight"]).view(rows, seq, heads, width)
        k = F.linear(h, w[prefix + "self_attn.k_proj.weight"]).view(rows, seq, kv, width)
        v = F.linear(h, w[prefix + "self_attn.v_proj.weight"]).view(rows, seq, kv, width)
        q, k = _rotate(q, self._cos, self._sin), _rotate(k, self._cos, self._sin)
        if kv != heads:
            k, v = (t.repeat_interleave(heads // kv, dim=2) for t in (k, v))
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(rows, seq, heads * width)
        x = x + _Join.apply(F.linear(mixed, w[prefix + "self_attn.o_proj.weight"]), self.group)
        h = _Spread.apply(self._norm(x, prefix + "post_attention_layernorm.weight"), self.group)
        gate, up = (F.linear(h, w[prefix + f"mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        down = F.linear(_SwiGLU.apply(gate, up), w[prefix + "mlp.down_proj.weight"])
        result: Tensor = x + _Join.apply(down, self.group)
        return result

    def _loss(self, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        head = self.parameters["model.embed_tokens.weight" if self.model.tied else "lm_head.weight"]
        h = _Spread.apply(self._norm(x, "model.norm.weight"), self.group)
        logits = F.linear(h.flatten(0, 1), head)
        each = weights.to(_wide(self.dtype)).repeat_interleave(targets.shape[1])
        result: Tensor = _CrossEntropy.apply(
            logits, targets.flatten(), each, self.share.vocab[0] if self.group.size > 1 else 0, self.group
        )
        return result
