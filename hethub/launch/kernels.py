"""The math of the layers as autograd functions that keep as little as they can.

Shapes: B rows, S tokens of a row, s tokens of this member's shard of it, D hidden, T = B x S tokens, t = B x s of them
on this member, W query columns, KW key or value columns, F feed-forward columns, V vocabulary rows, all of this rank.
Every function adds its weights' gradients to a sink where one is given, else it returns them to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from hethub.launch.gradients import WeightGradients, add_product, beginning, wide_dtype
from hethub.launch.groups import TensorGroup

__all__ = ["Attention", "Block", "Cell", "Embedding", "FeedForward", "HeadLoss"]


@dataclass(frozen=True, slots=True)
class Block:
    """What a function needs besides its weights.

    `packs` are the parameter names of the norm, of the columns and of the rows; `columns` the columns' weights as one
    tensor (outputs, D), whose storage the separate parameters share.
    """

    packs: tuple[tuple[str, ...], ...]
    columns: Tensor
    group: TensorGroup
    sink: WeightGradients | None
    sequence: int
    epsilon: float


# -- pieces -----------------------------------------------------------------------------------------------------


def _scales(x: Tensor, epsilon: float) -> Tensor:
    """1 / sqrt(mean(x^2) + epsilon) of each token of x (t, D), (t, 1) in the wide dtype."""
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x.dtype))
    return length.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()


def _normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + epsilon) * weight."""
    result: Tensor = (x * scale).mul_(weight).to(x.dtype)
    return result


def _norm_backward(gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (t, D) in its dtype and of the norm's weight (D,), wide. Spends `gradient` (t, D)."""
    wide = gradient.to(scale.dtype)
    broad = weight.to(scale.dtype)
    inner = (x * scale).mul_(wide)
    grad_weight = inner.sum(0)
    # the part along x itself: x * scale * mean(gradient * weight * normed)
    along = torch.mv(inner, broad).div_(x.shape[-1])[:, None] * scale
    grad_x = wide.mul_(broad).addcmul_(x.to(wide.dtype), along, value=-1).mul_(scale)
    return grad_x.to(x.dtype), grad_weight


def _gather(shard: Tensor, block: Block) -> Tensor:
    """(B, s, D) of every member -> (T, D)."""
    return block.group.all_gather(shard, block.sequence).flatten(0, 1)


def _scatter(whole: Tensor, rows: int, block: Block) -> Tensor:
    """(T, D) partial on every member -> (B, s, D) of the sum."""
    return block.group.reduce_scatter(whole.view(rows, block.sequence, -1))


def _enter(x: Tensor, norm: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Norm the shard x (B, s, D) and gather: (T, D), and the scales (t, 1)."""
    flat = x.flatten(0, 1)
    scale = _scales(flat, block.epsilon)
    normed = _normed(flat, scale, norm)
    return (normed if block.group.size == 1 else _gather(normed.view(x.shape), block)), scale


def _leave(mixed: Tensor, rows: Tensor, residual: Tensor, block: Block) -> Tensor:
    """residual (B, s, D) + the sum over members of mixed (T, columns) x rows (D, columns)^T."""
    if block.group.size == 1:
        return torch.addmm(residual.flatten(0, 1), mixed, rows.t()).view(residual.shape)
    return _scatter(mixed @ rows.t(), residual.shape[0], block).add_(residual)


def _whole_gradient(gradient: Tensor, block: Block) -> Tensor:
    """Of a block's output: the shard's (B, s, D) -> (T, D)."""
    if block.group.size == 1:
        return gradient.contiguous().flatten(0, 1)
    return _gather(gradient.contiguous(), block)


def _weight_gradients(
    block: Block, pack: int, weights: tuple[Tensor, ...], gradient: Tensor, inputs: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of a pack's weights: into the sink, or for autograd."""
    if block.sink is not None:
        block.sink.product(block.packs[pack], gradient, inputs)
        return (None,) * len(weights)
    whole = gradient.t() @ inputs
    return tuple(torch.split(whole, [len(weight) for weight in weights]))


def _norm_gradient(block: Block, gradient: Tensor, weight: Tensor) -> Tensor | None:
    if block.sink is not None:
        block.sink.vector(block.packs[0][0], gradient)
        return None
    return gradient.to(weight.dtype)


def _enter_backward(
    gradient: Tensor,  # of the columns' outputs (T, outputs)
    whole: Tensor | None,  # the columns' inputs (T, D) where they were kept
    x: Tensor,
    scale: Tensor,
    norm: Tensor,
    weights: tuple[Tensor, ...],
    residual: Tensor,
    block: Block,
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Backward of `_enter` and the columns' product: gradients of x, with `residual` added, norm and weights."""
    flat = x.flatten(0, 1)
    if whole is None:
        whole = _normed(flat, scale, norm)
    grad_weights = _weight_gradients(block, 1, weights, gradient, whole)
    inner = gradient @ block.columns
    if block.group.size > 1:
        inner = _scatter(inner, x.shape[0], block).flatten(0, 1)
    grad_x, grad_norm = _norm_backward(inner, flat, scale, norm)
    return grad_x.view(x.shape).add_(residual), _norm_gradient(block, grad_norm, norm), grad_weights


# -- attention --------------------------------------------------------------------------------------------------


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (B, S, heads, E) by rotary positions in place, halves as Hugging Face's Llama has them.

    cos and sin are (S, 1, E / 2); -sin turns back, which is the backward.
    """
    one, other = x.chunk(2, -1)
    turned = one * sin
    one.mul_(cos).addcmul_(other, sin, value=-1)
    other.mul_(cos).add_(turned)
    return x


class Cell:
    """The attention core of one decoder and micro-batch, from turned queries, keys and values to mixed values.

    `fill` does the core and keeps its graph until backward takes it. Without recomputation forward fills; with
    selective recomputation whoever comes first does: the RECOMPUTE action, or backward.
    """

    def __init__(self, inputs: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> None:
        self._inputs: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = inputs
        self._leaves: tuple[Tensor, ...] = ()
        self._mixed: Tensor | None = None

    def fill(self) -> None:
        """Do the core unless that has been done. Saved tensors are counted by whichever hooks are active."""
        if self._mixed is None and self._inputs is not None:
            leaves = tuple(tensor.detach().requires_grad_() for tensor in self._inputs())
            with torch.enable_grad():
                self._mixed = attend(*leaves)
            self._leaves = leaves
            self._inputs = None

    @property
    def mixed(self) -> Tensor:
        """The core's result (T, W), filled."""
        self.fill()
        assert self._mixed is not None
        return self._mixed.detach()

    def backward(self, gradient: Tensor) -> tuple[Tensor, ...]:
        """Gradients of queries, keys and values (B, S, heads, E). Empties the cell."""
        self.fill()
        assert self._mixed is not None
        mixed, leaves = self._mixed, self._leaves
        self._mixed, self._leaves = None, ()
        return torch.autograd.grad(beginning(mixed, gradient), leaves)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of (B, S, heads, E), key and value heads shared by equal groups of query heads: (T, W)."""
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=True,
        enable_gqa=key.shape[2] != query.shape[2],
    )
    return mixed.transpose(1, 2).flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class Heads:
    """Query and key-value heads of a rank, the elements of each, and the rotary table (S, 1, E / 2)."""

    query: int
    kv: int
    width: int
    cos: Tensor
    sin: Tensor

    def split(self, packed: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """(T, W + 2 KW) -> views of queries, keys and values (B, S, heads, E)."""
        heads = packed.view(rows, -1, self.query + 2 * self.kv, self.width)
        query, key, value = heads.split((self.query, self.kv, self.kv), 2)
        return query, key, value

    def turned(self, packed: Tensor, rows: int) -> Tensor:
        """View of queries and keys (B, S, heads, E), which rotary positions turn."""
        heads = packed.view(rows, -1, self.query + 2 * self.kv, self.width)
        return heads[:, :, : self.query + self.kv]


class Attention(torch.autograd.Function):
    """x + attention(norm(x)) of a shard x (B, s, D).

    Keeps x, one scale a token, and the packed queries, keys and values (T, W + 2 KW); in a group also the gathered
    inputs of the columns (T, D). Without recomputation the core's graph keeps its result and one log-sum a head too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
        block: Block,
        heads: Heads,
        cells: list[Cell] | None,
        keep: bool,
    ) -> Tensor:
        """`keep`: backward may come; `cells`: collects the cell, to be filled ahead of backward."""
        rows = x.shape[0]
        whole, scale = _enter(x, norm, block)
        packed = whole @ block.columns.t()
        rotate_(heads.turned(packed, rows), heads.cos, heads.sin)
        ctx.block, ctx.heads = block, heads
        if not keep:
            return _leave(attend(*heads.split(packed, rows)), output, x, block)
        gathered = () if block.group.size == 1 else (whole,)
        ctx.save_for_backward(x, norm, query, key, value, output, scale, packed, *gathered)
        if cells is None:
            cell = Cell(lambda: heads.split(packed, rows))
            cell.fill()
            mixed = cell.mixed
        else:
            mixed = attend(*heads.split(packed, rows))
            cell = Cell(lambda: heads.split(ctx.saved_tensors[7], rows))
            cells.append(cell)
        ctx.cell = cell
        return _leave(mixed, output, x, block)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `forward`."""
        x, norm, query, key, value, output, scale, packed, *gathered = ctx.saved_tensors
        block: Block = ctx.block
        heads: Heads = ctx.heads
        # A second backward over a retained graph does the core again.
        cell: Cell = ctx.cell or Cell(lambda: heads.split(packed, x.shape[0]))
        ctx.cell = None  # the cell may refer back to here
        whole = _whole_gradient(gradient, block)
        (grad_output,) = _weight_gradients(block, 2, (output,), whole, cell.mixed)
        parts = cell.backward(whole @ output)
        turned = torch.cat(parts, 2).view(packed.shape)
        rotate_(heads.turned(turned, x.shape[0]), heads.cos, -heads.sin)
        grad_x, grad_norm, grads = _enter_backward(
            turned,
            gathered[0] if gathered else None,
            x,
            scale,
            norm,
            (query, key, value),
            gradient,
            block,
        )
        return grad_x, grad_norm, *grads, grad_output, None, None, None, None


# -- feed-forward -----------------------------------------------------------------------------------------------


def _swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, 2020) of gate and up side by side (T, 2 F)."""
    gate, up = both.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _swiglu_backward(gradient: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `both` (T, 2 F), and the product (T, F) formed again."""
    gate, up = both.chunk(2, -1)
    result = torch.empty_like(both)
    grad_gate, grad_up = result.chunk(2, -1)
    silu = F.silu(gate)
    torch.mul(gradient, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=grad_gate)
    return result, silu.mul_(up)


class FeedForward(torch.autograd.Function):
    """x + down(silu(gate(norm(x))) * up(norm(x))) of a shard x (B, s, D).

    Keeps x, one scale a token, gate and up (T, 2 F); in a group also the gathered inputs of the columns (T, D).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, block: Block
    ) -> Tensor:
        """Weights gate and up (F, D), down (D, F)."""
        whole, scale = _enter(x, norm, block)
        both = whole @ block.columns.t()
        ctx.block = block
        gathered = () if block.group.size == 1 else (whole,)
        ctx.save_for_backward(x, norm, gate, up, down, scale, both, *gathered)
        return _leave(_swiglu(both), down, x, block)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `forward`."""
        x, norm, gate, up, down, scale, both, *gathered = ctx.saved_tensors
        block: Block = ctx.block
        whole = _whole_gradient(gradient, block)
        grad_both, product = _swiglu_backward(whole @ down, both)
        (grad_down,) = _weight_gradients(block, 2, (down,), whole, product)
        grad_x, grad_norm, grads = _enter_backward(
            grad_both, gathered[0] if gathered else None, x, scale, norm, (gate, up), gradient, block
        )
        return grad_x, grad_norm, *grads, grad_down, None


# -- embedding --------------------------------------------------------------------------------------------------


class Embedding(torch.autograd.Function):
    """Rows of a table cut over the group: tokens (B, S) -> (B, s, D). Keeps the tokens."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, tokens: Tensor, block: Block, first: int) -> Tensor:
        """`first`: the first vocabulary row of this rank."""
        ctx.block = block
        local, ctx.mine = tokens, None
        if block.group.size > 1:
            local = tokens - first
            ctx.mine = ((local >= 0) & (local < len(table)))[..., None]
            local = local.clamp_(0, max(0, len(table) - 1))
        ctx.save_for_backward(table, local)
        if block.group.size == 1:
            return F.embedding(tokens, table)
        rows = F.embedding(local, table).masked_fill_(~ctx.mine, 0.0)
        return block.group.reduce_scatter(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the arguments of `forward`."""
        table, local = ctx.saved_tensors
        block: Block = ctx.block
        whole = _whole_gradient(gradient, block)
        if ctx.mine is not None:
            whole = whole * ctx.mine.flatten(0, 1)
        rows = local.flatten()
        if block.sink is not None:
            block.sink.rows(block.packs[0][0], whole, rows)
            return None, None, None, None
        return torch.zeros_like(table).index_add_(0, rows, whole), None, None, None


# -- head and loss ----------------------------------------------------------------------------------------------


def _statistics(
    logits: Tensor, column: Tensor, mine: Tensor | None, group: TensorGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token of logits (c, V), each (c,): sum of exponentials over the whole vocabulary, the target's logit less the
    same maximum as in that sum, and what makes this rank's exponentials probabilities.

    `column` (c, 1) is the target's column here, if it is `mine` (c,; None in a group of one). Leaves the exponentials
    in `logits`.
    """
    top = logits.amax(-1, keepdim=True)
    logits.sub_(top)
    chosen = logits.gather(1, column)[:, 0]
    total = logits.exp_().sum(-1)
    if mine is None:
        return total, chosen, total.reciprocal()
    top = top[:, 0]
    own = torch.stack([top, total, (chosen + top).masked_fill_(~mine, 0.0)])
    tops, totals, targets = (
        group.all_gather(own.view(1, -1), group.size * own.numel()).view(group.size, 3, -1).unbind(1)
    )
    highest = tops.amax(0)
    everything = (totals * (tops - highest).exp_()).sum(0)
    return everything, targets.sum(0) - highest, (top - highest).exp_() / everything


class HeadLoss(torch.autograd.Function):
    """Final norm, head product and cross-entropy of a shard x (B, s, D): the weighted sum of losses over all T tokens.

    Logits exist for `chunk` tokens at a time. Where gradients are wanted, forward takes them chunk by chunk with the
    logits at hand, as the Liger kernels do (arXiv 2410.10989), so the head costs three products in forward, none in
    backward, and keeps one gradient (B, s, D). The vocabulary may be cut over the group; one exchange a chunk joins the
    members' maximum, sum of exponentials and chosen logit.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        head: Tensor,
        block: Block,
        targets: Tensor,
        weights: Tensor,
        first: int,
        chunk: int,
        scale: float | None,
        keep: bool,
    ) -> Tensor:
        """targets and weights are (T,), weights wide. With `scale` the gradients are those of loss x scale."""
        whole, scales = _enter(x, norm, block)
        wide = weights.dtype
        local, mine = targets, None
        if block.group.size > 1:
            local = targets - first
            mine = (local >= 0) & (local < len(head))
            local = local.clamp_(0, len(head) - 1)
        column = local[:, None]
        ctx.block, ctx.scaled = block, scale is not None
        direct = block.sink is not None and ctx.scaled
        if keep:
            share = weights if scale is None else weights * scale
            taken = -(share if mine is None else share * mine)[:, None]
            grad_whole = torch.empty_like(whole)
            if direct and block.sink is not None:
                grad_head = block.sink.buffers[block.packs[1][0]]
            else:
                grad_head = torch.zeros_like(head, dtype=wide)
        totals, chosen = torch.empty_like(weights), torch.empty_like(weights)
        for start in range(0, len(whole), chunk):
            at = slice(start, start + chunk)
            inputs = whole[at]
            logits = (inputs @ head.t()).to(wide)
            totals[at], chosen[at], factor = _statistics(
                logits, column[at], None if mine is None else mine[at], block.group
            )
            if keep:
                logits.mul_((factor * share[at])[:, None]).scatter_add_(1, column[at], taken[at])
                gradient = logits.to(head.dtype)
                torch.mm(gradient, head, out=grad_whole[at])
                add_product(grad_head, gradient, inputs)
                del gradient
            del logits  # before the next ones are made
        loss = totals.log().sub_(chosen).mul_(weights).sum(dtype=torch.float64)
        if keep:
            flat = x.flatten(0, 1)
            if block.group.size > 1:
                grad_whole = _scatter(grad_whole, x.shape[0], block).flatten(0, 1)
            grad_x, grad_norm = _norm_backward(grad_whole, flat, scales, norm)
            kept = [grad_x.view(x.shape)]
            if direct and block.sink is not None:
                block.sink.vector(block.packs[0][0], grad_norm)
            else:
                kept += [grad_norm, grad_head]
            ctx.dtype = head.dtype
            ctx.save_for_backward(*kept)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Hand on what forward took."""
        gradients = list(ctx.saved_tensors)
        if not ctx.scaled:
            gradients = [gradient * upstream.to(gradient.dtype) for gradient in gradients]
        rest = (None,) * 7
        if len(gradients) == 1:
            return gradients[0], None, None, *rest
        grad_x, grad_norm, grad_head = gradients
        block: Block = ctx.block
        if block.sink is not None:
            for (name,), gradient in zip(block.packs, (grad_norm, grad_head), strict=True):
                block.sink.vector(name, gradient)
            return grad_x, None, None, *rest
        return grad_x, grad_norm.to(ctx.dtype), grad_head.to(ctx.dtype), *rest
