"""The model as a PyTorch user would write it: nn.Linear layers and torch's own functions, for torch's own engines.

The math is that of `hethub.launch.model`, the initial weights are those of `hethub.launch.weights`, and the names
of the parameters are Hugging Face's, so that both engines train the same. Shapes: B rows, S tokens, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn

from hethub.cost.shapes import layer_parameters
from hethub.launch.weights import initial_weight
from hethub.specs.layout import Span
from hethub.specs.workload import Model

__all__ = ["Llama", "llama", "loss_of"]


class Attention(nn.Module):
    """Causal attention with rotary positions; the head count follows from the projections' width."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.width = model.head_dim
        self.grouped = model.kv_heads != model.heads
        inner, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.q_proj = nn.Linear(model.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(model.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(model.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(inner, model.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D); `cos` and `sin` are (S, 1, head_dim)."""
        rows, seq, _ = x.shape
        q, k, v = (p(x).view(rows, seq, -1, self.width) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.grouped
        )
        result: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_size, bias=False)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_size, bias=False)
        self.down_proj = nn.Linear(model.ffn_size, model.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        result: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)
        self.mlp = FeedForward(model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        result: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return result


class Inner(nn.Module):
    """What Hugging Face calls `model`: the embedding, decoders and final norm that the range has."""

    def __init__(self, model: Model, layers: Span) -> None:
        super().__init__()
        if layers[0] == 0:
            self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        decoders = range(max(layers[0], 1), min(layers[1], model.layers + 1))
        self.layers = nn.ModuleDict({str(layer - 1): Block(model) for layer in decoders})
        if layers[1] == model.layers + 2:
            self.norm = nn.RMSNorm(model.hidden_size, eps=model.norm_epsilon)


class Llama(nn.Module):
    """Layers [a, b) of an untied model: 0 the embedding, 1 to L the decoders, L + 1 the final norm and head."""

    def __init__(self, model: Model, layers: Span, sequence_length: int) -> None:
        super().__init__()
        self.model = Inner(model, layers)
        if layers[1] == model.layers + 2:
            self.lm_head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        steps = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
        angle = torch.outer(torch.arange(sequence_length, dtype=torch.float64), model.rope_theta**-steps)
        angle = torch.cat([angle, angle], -1)[:, None, :]
        # Not registered as buffers: DistributedDataParallel would send them around in every step.
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def forward(self, x: Tensor) -> Tensor:
        """Token ids (B, S) where the range begins the model, else (B, S, D); logits (B, S, V) where it ends it."""
        inner = self.model
        if hasattr(inner, "embed_tokens"):
            x = inner.embed_tokens(x)
        for block in inner.layers.values():
            x = block(x, self.cos, self.sin)
        if hasattr(inner, "norm"):
            x = self.lm_head(inner.norm(x))
        return x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def llama(model: Model, layers: Span, sequence_length: int, seed: int) -> Llama:
    """A part of the model in fp32, with the initial weights of HetHub's run of the same seed."""
    if model.tied or model.rope_scaling is not None:
        raise ValueError(
            f"{model.name} has a tied head or scaled positions, which this model is not written for"
        )
    made = Llama(model, layers, sequence_length)
    weights = dict(made.named_parameters())
    with torch.no_grad():
        for layer in range(*layers):
            for parameter in layer_parameters(model, layer):
                whole = (0, parameter.shape[parameter.axis])
                weights.pop(parameter.name).copy_(
                    torch.from_numpy(initial_weight(parameter, whole, model, seed))
                )
    if weights:
        raise AssertionError(f"no initial weights for {sorted(weights)}")
    return made


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of -log softmax(logits)[target]; logits (B, S, V), targets (B, S)."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")
