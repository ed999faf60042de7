"""What the comparisons of engines rest on."""

import os
import time

import pytest
import torch

from benchmarks.bench.crew import Crew, WorkerError
from benchmarks.bench.llama import llama, loss_of
from benchmarks.bench.plans import llama_model
from benchmarks.bench.quota import CpuQuotas, cut_rows, why_no_quotas
from hethub.cost.shapes import Parameter
from hethub.launch.model import StageModel
from hethub.launch.weights import initial_weight
from hethub.specs.layout import Share, Span

MODEL = llama_model(hidden=64, layers=3, heads=2, vocab=96)
SEQUENCE = 12


class _Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> tuple[int, int]:
        self.count += number
        return self.count, os.getpid()

    def busy(self, seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass


class _Broken:
    def __init__(self) -> None:
        raise ValueError("no such thing")


def test_both_sides_models_give_the_same_loss_and_gradients() -> None:
    def initial(parameter: Parameter, span: Span) -> torch.Tensor:
        return torch.from_numpy(initial_weight(parameter, span, MODEL, 7))

    layers = (0, MODEL.layers + 2)
    ours = StageModel(
        MODEL,
        layers,
        Share.whole(MODEL),
        sequence_length=SEQUENCE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        weights=initial,
    )
    theirs = llama(MODEL, layers, SEQUENCE, 7)
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randint(0, 96, (2, SEQUENCE), generator=generator) for _ in range(2))
    mine = ours.forward(inputs, targets, torch.ones(2))
    other = loss_of(theirs(inputs), targets)
    mine.backward()
    other.backward()
    assert float(mine.detach()) == pytest.approx(float(other.detach()), rel=1e-5)
    gradients = {name: weight.grad for name, weight in theirs.named_parameters()}
    assert gradients.keys() == ours.parameters.keys()
    for name, weight in ours.parameters.items():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-3, atol=1e-4)


def test_the_parts_of_a_cut_model_are_the_whole_model() -> None:
    tokens = torch.arange(SEQUENCE)[None]
    whole = llama(MODEL, (0, MODEL.layers + 2), SEQUENCE, 7)
    x = tokens
    for part in ((0, 2), (2, MODEL.layers + 2)):
        x = llama(MODEL, part, SEQUENCE, 7)(x)
    torch.testing.assert_close(x, whole(tokens))


def test_a_crew_answers_in_order_keeps_its_objects_and_counts_their_cpu_time() -> None:
    with Crew([_Counter, _Counter]) as crew:
        crew.call("add", 1)
        before = crew.cpu_seconds()
        crew.call("busy", 0.2)
        assert (
            crew.cpu_seconds() - before >= 0.36
        )  # two processes; ticks of 10 ms, of user and system time each
        answers = crew.call("add", 2)
        assert answers == [(3, process.pid) for process in crew.processes]
    assert not any(process.is_alive() for process in crew.processes)


def test_a_failing_object_is_told_with_its_traceback_and_its_crew_ends() -> None:
    with pytest.raises(WorkerError, match="no such thing"):
        Crew([_Counter, _Broken])
    with Crew([_Counter]) as crew, pytest.raises(WorkerError, match="has no attribute 'multiply'"):
        crew.call("multiply", 2)


def test_rows_are_cut_by_speed_and_must_come_out_whole() -> None:
    assert cut_rows(88, [0.6, 0.6, 0.3, 0.15]) == [32, 32, 16, 8]
    with pytest.raises(ValueError, match="90 rows"):
        cut_rows(90, [0.6, 0.6, 0.3, 0.15])


@pytest.mark.skipif(why_no_quotas() is not None, reason=f"no CPU quotas here: {why_no_quotas()}")
def test_a_worker_under_a_quota_takes_its_time_and_the_groups_go_away() -> None:
    with CpuQuotas([0.5, 0.1]) as quotas:
        groups = quotas.groups
        assert all(group.is_dir() for group in groups)
        with Crew([_Counter]) as crew:
            quotas.place(crew, [1])
            crew.start("busy", 0.1)
            # 0.1 s of CPU at a tenth of a core; what a period is overdrawn by is paid back, and load only adds.
            assert crew.timed(crew.finish()) > 0.8
    assert not any(group.exists() or group.parent.exists() for group in groups)
