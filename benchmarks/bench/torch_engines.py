"""PyTorch's own engines at their best settings found, as `train(first, last)` objects for a crew's processes.

What every one gets: fused AdamW, one math thread, gradients set to None or kept in buckets, the loss divided once by
the batch's tokens (so that nothing is scaled afterwards), torch's own clipping.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from hethub.data.batches import Batches
from hethub.data.token_file import open_token_file
from hethub.launch.optimizer import learning_rate
from hethub.specs.layout import Span

from .crew import Answer
from .engines import CrewEngine, Training
from .llama import llama, loss_of

__all__ = ["DataParallel", "Pipelining", "TensorParallel", "Theirs", "ZeroOptimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seat:
    """Which process of the job this is."""

    rank: int
    size: int
    port: int


class _Side:
    """One process of a torch engine: joins the group, reads the same rows, takes the same learning rates."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(self, training: Training, seat: _Seat) -> None:
        torch.set_num_threads(1)
        self.training = training
        self.seat = seat
        self.workload = training.workload
        limit = datetime.timedelta(minutes=10)
        store = dist.TCPStore("127.0.0.1", seat.port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=seat.rank, world_size=seat.size, timeout=limit)
        self.batches = Batches(
            open_token_file(training.tokens_file).tokens,
            sequence_length=self.workload.sequence_length,
            global_batch=self.workload.global_batch,
            seed=training.seed,
            held_out=training.held_out,
        )
        self.tokens = self.workload.global_batch * self.workload.sequence_length

    def part(self, layers: Span | None = None) -> nn.Module:
        """Layers of the model with their initial weights; None is all of them."""
        model = self.workload.model
        return llama(
            model, layers or (0, model.layers + 2), self.workload.sequence_length, self.training.seed
        )

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: matrices decay, norm weights do not."""
        weights = list(self.model.parameters())
        groups = [
            {
                "params": [w for w in weights if w.dim() > 1],
                "weight_decay": self.training.settings.weight_decay,
            },
            {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def optimizer_options(self) -> dict[str, Any]:
        """Of AdamW, fused: on the CPU it takes a third of the time of torch's default."""
        settings = self.training.settings
        return {
            "lr": settings.learning_rate,
            "betas": (settings.beta1, settings.beta2),
            "eps": settings.epsilon,
            "fused": True,
        }

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW over this process's model."""
        return torch.optim.AdamW(self.groups(), **self.optimizer_options())

    def rows(self, step: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Token ids and targets (rows, S)."""
        inputs, targets = self.batches.rows(step, start, stop)
        return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets))

    def train(self, first: int, last: int) -> list[float]:
        """Steps [first, last): this process's part of each step's loss, which add up over processes."""
        losses = []
        for step in range(first, last):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.training.settings, step, self.training.total_steps)
            losses.append(self.gradients(step))
            self.clip()
            self.optimizer.step()
            self.forget()
        return losses

    def gradients(self, step: int) -> float:
        """Fill the gradients of the whole batch; returns this process's part of the loss."""
        raise NotImplementedError

    def clip(self) -> None:
        """Clip by the global norm."""
        limit = self.training.settings.clip_norm
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def forget(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


class DataParallel(_Side):
    """DistributedDataParallel: equal rows for all. Gradients live in the buckets (no copy), the graph is static,
    micro-batches before the last do not reduce."""

    def __init__(
        self, training: Training, seat: _Seat, *, bucket_mebibytes: float, micro_batches: int = 1
    ) -> None:
        super().__init__(training, seat)
        self.micro_batches = micro_batches
        self.each, rest = divmod(self.workload.global_batch, seat.size * micro_batches)
        if rest:
            raise ValueError(
                f"{self.workload.global_batch} rows do not divide by {seat.size * micro_batches}"
            )
        self.model = DistributedDataParallel(
            self.part(),
            bucket_cap_mb=bucket_mebibytes,
            gradient_as_bucket_view=True,
            static_graph=micro_batches == 1,
        )
        self.optimizer = self.make_optimizer()

    def gradients(self, step: int) -> float:
        """Reduction of early buckets overlaps with the rest of the last backward pass."""
        assert isinstance(self.model, DistributedDataParallel)
        total = 0.0
        for micro_batch in range(self.micro_batches):
            start = (micro_batch * self.seat.size + self.seat.rank) * self.each
            inputs, targets = self.rows(step, start, start + self.each)
            last = micro_batch == self.micro_batches - 1
            with nullcontext() if last else self.model.no_sync():
                loss = loss_of(self.model(inputs), targets) / self.tokens
                # The engine averages over processes; the loss is a part of the batch's mean.
                torch.autograd.backward(loss * self.seat.size)
            total += float(loss.detach())
        return total


class ZeroOptimizer(DataParallel):
    """ZeroRedundancyOptimizer on DistributedDataParallel: each process updates its share and sends the new weights."""

    def make_optimizer(self) -> torch.optim.Optimizer:
        """AdamW, whose state and work are shared out over the processes."""
        return ZeroRedundancyOptimizer(
            self.groups(), torch.optim.AdamW, parameters_as_bucket_view=True, **self.optimizer_options()
        )


class Pipelining(_Side):
    """`torch.distributed.pipelining` 1F1B: stage i of the even cut on process i."""

    def __init__(self, training: Training, seat: _Seat, *, cuts: Sequence[int], micro_batches: int) -> None:
        super().__init__(training, seat)
        self.model = self.part((cuts[seat.rank], cuts[seat.rank + 1]))
        stage = PipelineStage(self.model, seat.rank, seat.size, torch.device("cpu"))
        self.schedule = Schedule1F1B(
            stage,
            micro_batches,
            loss_fn=lambda logits, targets: loss_of(logits, targets) / self.tokens,
            scale_grads=False,
        )
        self.optimizer = self.make_optimizer()

    def gradients(self, step: int) -> float:
        """The whole schedule; the last process has the loss."""
        inputs, targets = self.rows(step, 0, self.workload.global_batch)
        losses: list[Tensor] = []
        if self.seat.rank == 0:
            self.schedule.step(inputs, return_outputs=False)
        elif self.seat.rank == self.seat.size - 1:
            self.schedule.step(target=targets, losses=losses, return_outputs=False)
        else:
            self.schedule.step(return_outputs=False)
        return float(torch.stack(losses).sum().detach()) if losses else 0.0

    def clip(self) -> None:
        """The norm over all stages: their sums of squares add up."""
        limit = self.training.settings.clip_norm
        if limit is None:
            return
        weights = list(self.model.parameters())
        squares = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None]).square()
        dist.all_reduce(squares)
        torch.nn.utils.clip_grads_with_norm_(weights, limit, squares.sqrt())


class TensorParallel(_Side):
    """`torch.distributed.tensor.parallel` as torchtitan lays it out, with or without sequence parallelism, and with the
    loss kept parallel over the vocabulary."""

    def __init__(
        self, training: Training, seat: _Seat, *, sequence_parallel: bool, micro_batches: int = 1
    ) -> None:
        super().__init__(training, seat)
        self.micro_batches = micro_batches
        mesh = init_device_mesh("cpu", (seat.size,))
        self.model = parallelize_module(self.part(), mesh, self._styles(sequence_parallel))
        self.optimizer = self.make_optimizer()

    def _styles(self, sequence_parallel: bool) -> dict[str, ParallelStyle]:
        between = Shard(1) if sequence_parallel else Replicate()
        styles: dict[str, ParallelStyle] = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
            "lm_head": ColwiseParallel(
                input_layouts=between, output_layouts=Shard(-1), use_local_output=False
            ),
        }
        block = "model.layers.*."
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            styles[block + name] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            styles[block + name] = RowwiseParallel(output_layouts=between)
        if sequence_parallel:
            styles["model.norm"] = SequenceParallel()
            for name in ("input_layernorm", "post_attention_layernorm"):
                styles[block + name] = SequenceParallel()
            # One gather for the three (two) columns that read the same tokens.
            styles[block + "self_attn"] = PrepareModuleInput(
                input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
            )
            styles[block + "mlp"] = PrepareModuleInput(
                input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
            )
        return styles

    def clip(self) -> None:
        """The norm over sharded weights and, without sequence parallelism, the norms' whole ones."""
        limit = self.training.settings.clip_norm
        weights = list(self.model.parameters())
        sharded = [w for w in weights if isinstance(w, DTensor)]
        whole = [w for w in weights if not isinstance(w, DTensor)]
        if not whole:
            super().clip()
        elif limit is not None:
            total = torch.nn.utils.get_total_norm([w.grad for w in sharded if w.grad is not None])
            assert isinstance(total, DTensor)
            rest = torch.nn.utils.get_total_norm([w.grad for w in whole if w.grad is not None])
            norm = torch.hypot(total.full_tensor(), rest)
            for some in (sharded, whole):
                torch.nn.utils.clip_grads_with_norm_(some, limit, norm)

    def gradients(self, step: int) -> float:
        """All processes see all rows and hold the whole loss; the first reports it."""
        total = 0.0
        each = self.workload.global_batch // self.micro_batches
        for micro_batch in range(self.micro_batches):
            inputs, targets = self.rows(step, micro_batch * each, (micro_batch + 1) * each)
            with loss_parallel():
                loss = loss_of(self.model(inputs), targets) / self.tokens
                torch.autograd.backward(loss)
            whole = loss.detach()
            assert isinstance(whole, DTensor)
            total += float(whole.full_tensor())
        return total if self.seat.rank == 0 else 0.0


class Theirs(CrewEngine):
    """A torch engine over `size` processes; `options` are those of `side`."""

    def __init__(self, side: type[_Side], training: Training, size: int, **options: object) -> None:
        super().__init__(
            lambda port: [
                partial(side, training, _Seat(rank=rank, size=size, port=port), **options)
                for rank in range(size)
            ]
        )

    def losses(self, answers: Sequence[Answer]) -> list[float]:
        """The processes' parts added up."""
        return [sum(parts) for parts in zip(*(answer.value for answer in answers), strict=True)]
