"""Measures what two processes of this host exchange over the library that training uses between unlike devices:
messages, the collectives of a tensor-parallel group of two, and the CPU time that a message takes at either end."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
import torch.distributed as dist

from hethub.errors import MachineError
from hethub.launch.groups import ExchangeGroup
from hethub.launch.profiler import Spread, repeated
from hethub.launch.sockets import open_store

__all__ = ["OPERATIONS", "Exchange", "measure_exchanges"]

OPERATIONS = ("send", "send_work", "receive_work", "all_gather", "reduce_scatter", "all_reduce")
_PROCESSES = 2
_ANSWER_SECONDS = 120.0
_MESSAGES = 16  # that one reading of the CPU's clock covers
# Between two of them, as compute is in training: in a stream everything stays awake and warm, and a message was seen to
# take a fourth of the CPU time.
_PAUSE_SECONDS = 2e-3

Once = Callable[[], list[float]]


class Exchange(NamedTuple):
    """An operation of `OPERATIONS` and its bytes: what each process puts in."""

    operation: str
    message_bytes: int


def measure_exchanges(wanted: list[Exchange], budget_seconds: float) -> list[Spread]:
    """Seconds of each: of a message one way, half a round trip; of `send_work` and `receive_work` CPU seconds of all
    threads of that end. Raises MachineError when the processes do not answer."""
    store = open_store("127.0.0.1")
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(_PROCESSES)]
    processes = [
        context.Process(target=_end, args=(rank, store.port, wanted, budget_seconds, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()
    try:
        first, second = (_answer(ours, budget_seconds * len(wanted)) for ours, _ in pipes)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [
        theirs if exchange.operation == "receive_work" else ours
        for exchange, ours, theirs in zip(wanted, first, second, strict=True)
    ]


def _answer(connection: Connection, budget_seconds: float) -> list[Spread]:
    if not connection.poll(_ANSWER_SECONDS + 10 * budget_seconds):
        raise MachineError("two processes of this host do not answer each other. Look at GLOO_SOCKET_IFNAME.")
    try:
        found: list[Spread] = connection.recv()
    except EOFError:
        raise MachineError("the processes that measure messages have ended. Run with --debug.") from None
    return found


def _end(rank: int, port: int, wanted: list[Exchange], budget_seconds: float, answer: Connection) -> None:
    """One end; the first says how often something is done again."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=_PROCESSES)
    group = ExchangeGroup(range(_PROCESSES))
    take = _lead if rank == 0 else _follow
    found = []
    for exchange in wanted:
        spread = take(_once(exchange, rank, group), budget_seconds)
        found.append(Spread(spread.seconds / _messages(exchange), spread.ratio))
    answer.send(found)
    with suppress(EOFError):  # an end that goes may take with it what the other has not read yet
        answer.recv()


def _lead(once: Once, budget_seconds: float) -> Spread:
    """Repeat together with the other end."""
    word = torch.ones(1, dtype=torch.uint8)

    def together() -> list[float]:
        dist.send(word, 1)
        dist.recv(word, 1)  # it begins now, too
        return once()

    (spread,) = repeated(together, budget_seconds)
    dist.send(torch.zeros(1, dtype=torch.uint8), 1)
    return spread


def _follow(once: Once, budget_seconds: float) -> Spread:
    """Do as often as the first end says; how long it took here, the first time, when all is cold, left out."""
    word = torch.ones(1, dtype=torch.uint8)
    found: list[float] = []
    while True:
        dist.recv(word, 0)
        if not word.item():
            return Spread.of(found[1:])
        dist.send(word, 0)
        found += once()


def _messages(exchange: Exchange) -> int:
    """Of one repetition."""
    return _MESSAGES if exchange.operation.endswith("_work") else 1


def _once(exchange: Exchange, rank: int, group: ExchangeGroup) -> Once:
    """One repetition of an exchange at this end, and what it took."""
    size = exchange.message_bytes
    if exchange.operation == "send":
        return _round_trip(torch.zeros(size, dtype=torch.uint8), rank)
    if exchange.operation.endswith("_work"):
        return _one_by_one(torch.zeros(size, dtype=torch.uint8), rank)
    own = torch.zeros(1, size // 4)
    calls: dict[str, Callable[[], object]] = {
        "all_gather": lambda: group.all_gather(own, _PROCESSES * own.shape[1]),
        "reduce_scatter": lambda: group.reduce_scatter(own),
        "all_reduce": lambda: group.sum(own),
    }
    call = calls[exchange.operation]

    def once() -> list[float]:
        begin = time.perf_counter()
        call()
        return [time.perf_counter() - begin]

    return once


def _round_trip(buffer: torch.Tensor, rank: int) -> Once:
    def once() -> list[float]:
        begin = time.perf_counter()
        for sends in (rank == 0, rank == 1):
            if sends:
                dist.send(buffer, 1 - rank)
            else:
                dist.recv(buffer, 1 - rank)
        return [(time.perf_counter() - begin) / 2]

    return once


def _one_by_one(buffer: torch.Tensor, rank: int) -> Once:
    """Messages one way, each alone; CPU seconds of all of them here."""
    move = dist.send if rank == 0 else dist.recv

    def once() -> list[float]:
        begin = time.process_time()
        for _ in range(_MESSAGES):
            if rank == 0:
                time.sleep(_PAUSE_SECONDS)
            move(buffer, 1 - rank)
        return [time.process_time() - begin]

    return once
