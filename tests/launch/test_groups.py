"""Tensor-parallel groups between real processes: both kinds do the same, and both are what one process computes."""

from __future__ import annotations

import datetime
import multiprocessing
from multiprocessing.connection import Connection

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hethub.launch.gradients import WeightGradients
from hethub.launch.groups import ExchangeGroup, Library, NativeGroup, SoloGroup
from hethub.specs.layout import sequence_span
from tests.launch.test_model import GROUPS, batch, joined_gradients, stage

SIZE = 3
MODEL, SHARES = GROUPS["three, SEQUENCE no multiple"]
# Rows and tokens: one row is received in place; 7 tokens leave a short shard; 2 tokens leave none for the last.
KINDS = ("exchange", "native", "native without whole tensors", "native that overlaps")
SHAPES = ((1, 6), (1, 7), (2, 7), (2, 2))
# Added in rank order they give 0 + 1; in any other order, with the first two apart, 0.
VALUES = (1e16, -1e16, 1.0)


def whole(member: int, rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(member)
    return torch.randint(-8, 8, (rows, tokens, 5), generator=generator).to(dtype)


def _member(rank: int, port: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE, timeout=limit)
    found: dict[str, object] = {}
    lists = NativeGroup(Library(range(SIZE), "gloo"))
    lists.library.whole_tensors = False
    overlaps = NativeGroup(Library(range(SIZE), "gloo", overlaps=True))
    groups = (ExchangeGroup(range(SIZE)), NativeGroup(Library(range(SIZE), "gloo")), lists, overlaps)
    for name, group in zip(KINDS, groups, strict=True):
        assert group.member == rank
        for shape in SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                mine = whole(rank, *shape, dtype)
                start, stop = sequence_span(shape[1], SIZE, rank)
                shard = mine[:, start:stop].contiguous()
                found[f"{name} {shape} {dtype}"] = (
                    group.all_gather(shard, shape[1]).tolist(),
                    group.reduce_scatter(mine).tolist(),
                )
        found[f"{name} events"] = len(group.take_events()) == 4 * len(SHAPES)
        found[f"{name} order"] = group.reduce_scatter(torch.full((1, SIZE), VALUES[rank]).double()).tolist()
        kept = group.all_gather(torch.ones(1, 1), SIZE)
        group.all_gather(torch.zeros(1, 1), SIZE)
        found[f"{name} kept"] = kept.tolist()
        part = stage(MODEL, share=SHARES[rank], group=group)
        part.sink = WeightGradients([part])
        loss = part.forward_layers(part.layers, *batch(), loss_scale=1 / 48)
        loss.backward()
        found[f"{name} model"] = (
            float(loss.detach()),
            {parameter: buffer.tolist() for parameter, buffer in part.sink.buffers.items()},
        )
    connection.send(found)
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers() -> list[dict]:
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ours, processes = [], []
    for rank in range(SIZE):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=_member, args=(rank, store.port, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a member that dies is an EOFError here
        ours.append(mine)
    found = [connection.recv() for connection in ours]
    for process in processes:
        process.join()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shards_are_gathered_and_sums_scattered(answers, kind, dtype, shape):
    """Caught when seeded: padding left in, spans of the sender taken for the receiver's."""
    spans = [sequence_span(shape[1], SIZE, member) for member in range(SIZE)]
    wholes = [whole(member, *shape, dtype) for member in range(SIZE)]
    gathered = torch.cat([w[:, a:b] for w, (a, b) in zip(wholes, spans, strict=True)], 1)
    total = sum(wholes)
    for answer, (start, stop) in zip(answers, spans, strict=True):
        found, scattered = answer[f"{kind} {shape} {dtype}"]
        assert found == gathered.tolist()
        assert scattered == total[:, start:stop].tolist()


def test_an_exchange_adds_in_rank_order_on_every_member(answers):
    assert [a["exchange order"] for a in answers] == [[[1.0]]] * SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_is_not_overwritten_by_the_next_collective(answers, kind):
    assert [a[f"{kind} kept"] for a in answers] == [[[1.0] * SIZE]] * SIZE


@pytest.mark.parametrize("kind", KINDS)
def test_every_collective_is_an_event(answers, kind):
    assert all(a[f"{kind} events"] for a in answers)


@pytest.mark.parametrize("kind", KINDS)
def test_uneven_shares_train_like_one_process(answers, kind):
    one = stage(MODEL)
    loss = one.forward(*batch())
    (loss / 48).backward()
    values, gradients = zip(*(a[f"{kind} model"] for a in answers), strict=True)
    assert len(set(values)) == 1 and values[0] == pytest.approx(float(loss.detach()), rel=1e-12)
    tensors = [{n: torch.tensor(g, dtype=torch.float64) for n, g in each.items()} for each in gradients]
    for name, gradient in joined_gradients(MODEL, SHARES, tensors).items():
        torch.testing.assert_close(gradient, one.parameters[name].grad, rtol=1e-9, atol=1e-13)


def test_a_group_of_one_returns_what_it_is_given():
    group, tensor = SoloGroup(), torch.ones(1, 2)
    assert all(t is tensor for t in (group.all_gather(tensor, 2), group.reduce_scatter(tensor)))
