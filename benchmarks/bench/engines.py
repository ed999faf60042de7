"""Engines to be compared: each trains the same task in processes of its own, some steps at a time.

`Training` says what is trained. An engine's time is the wall time of whole optimizer steps: forward, backward,
reduction, clipping by the global norm, AdamW, new weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch.distributed as dist

from hethub.cost.compute import ComputeModel
from hethub.cost.graph import CostGraph
from hethub.data.token_file import build_token_file
from hethub.data.tokenizers import ByteTokenizer
from hethub.launch.meter import ready_to_count
from hethub.launch.worker import Task, Worker, WorkerSetup
from hethub.program.compile import compile_program
from hethub.program.prove import prove
from hethub.specs.job import OptimizerSettings
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.specs.workload import Workload

from .crew import Answer, Crew

__all__ = [
    "CrewEngine",
    "Ours",
    "Pair",
    "Repetition",
    "Training",
    "alternate",
    "idle_ratio",
    "loss_differs",
    "loss_fell",
    "median_ratio",
    "raw_of",
    "spread",
    "take",
    "text_of",
]

SETTINGS = OptimizerSettings(
    learning_rate=3e-4,
    warmup_steps=10,
    weight_decay=0.1,
    clip_norm=1.0,
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    final_learning_rate_ratio=0.1,
)
COMPARED_STEPS = 20  # over which any two plans must agree
_TOTAL_STEPS = 1000  # of the learning-rate schedule; no comparison takes so many
_HELD_OUT = 0.05
_WORDS = 400
_TEXT_WORDS = 120_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What both sides train, in fp32: a pure function of these fields."""

    workload: Workload
    tokens_file: Path
    settings: OptimizerSettings = SETTINGS
    seed: int = 1
    total_steps: int = _TOTAL_STEPS
    held_out: float = _HELD_OUT


def text_of(folder: Path) -> Path:
    """A token file of made-up words, the frequent ones more frequent, so that there is something to learn."""
    generator = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)
    words = [generator.choice(letters, generator.integers(2, 9)).tobytes() for _ in range(_WORDS)]
    odds = 1 / np.arange(1, _WORDS + 1)
    chosen = generator.choice(_WORDS, _TEXT_WORDS, p=odds / odds.sum())
    source = folder / "words.txt"
    source.write_bytes(b" ".join(words[i] for i in chosen))
    return build_token_file([source], ByteTokenizer(), folder / "words.tokens").path


@dataclass(frozen=True, slots=True)
class Repetition:
    """Some steps of one engine: wall seconds and CPU seconds (of all its processes) of all of them, and the loss of
    each (mean nats per token)."""

    seconds: float
    cpu_seconds: float
    losses: tuple[float, ...]


class CrewEngine:
    """An engine whose objects have `train(first, last)`; subclasses say what its answers mean."""

    def __init__(self, makers: Callable[[int], Sequence[Callable[[], object]]]) -> None:
        """`makers` gets the port of the job's store."""
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.crew = Crew(makers(self._store.port))
        self._step = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.crew.close()

    def start(self, steps: int) -> None:
        """Let the processes take that many steps."""
        self._cpu_seconds = self.crew.cpu_seconds()
        self.crew.start("train", self._step, self._step + steps)
        self._step += steps

    def finish(self) -> Repetition:
        """Wait for them."""
        answers = self.crew.finish()
        spent = self.crew.cpu_seconds() - self._cpu_seconds
        return Repetition(self.crew.timed(answers), spent, tuple(self.losses(answers)))

    def losses(self, answers: Sequence[Answer]) -> list[float]:
        """The loss of each step from what the processes returned."""
        raise NotImplementedError


class Ours(CrewEngine):
    """HetHub's own runtime: real worker processes that run a plan on real CPU devices, no Ray, no emulation."""

    def __init__(
        self, plan: Plan, training: Training, timeout_seconds: float = 300.0, *, telemetry: Path | None = None
    ) -> None:
        """With the folder `telemetry` the workers count while they train, as in a run."""
        self.training, self.telemetry = training, telemetry
        count = len(plan.cluster.devices())
        super().__init__(
            lambda port: [
                partial(
                    Worker,
                    WorkerSetup(
                        device=device,
                        rank_of={i: i for i in range(count)},
                        store_host="127.0.0.1",
                        store_port=port,
                        timeout_seconds=timeout_seconds,
                    ),
                )
                for device in range(count)
            ]
        )
        self.load(plan)

    def load(self, plan: Plan) -> None:
        """Train another plan of the same devices, from the first step."""
        compute = ComputeModel(CostGraph(plan.cluster), plan.workload)
        program = compile_program(lay_out(plan), compute)
        prove(program)
        self.root, self._step = program.layout.used[0], 0
        training = self.training
        task = Task(
            graph=compute.graph,
            workload=plan.workload,
            program=program,
            evaluation=None,
            settings=training.settings,
            seed=training.seed,
            total_steps=training.total_steps,
            tokens_file=training.tokens_file,
            held_out=training.held_out,
            meter=None
            if self.telemetry is None
            else ready_to_count(
                self.telemetry,
                program,
                compute.graph,
                plan.workload,
                run="bench",
                time_scale=1.0,
                peak_bytes=dict.fromkeys(program.layout.used, 0),
                one_clock=True,
            ),
        )
        self.crew.call("load", task)
        self.crew.call("start_clock", time.monotonic(), 1.0)

    def losses(self, answers: Sequence[Answer]) -> list[float]:
        """The root's."""
        return [result.loss for result in answers[self.root].value]


# -- pairs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A repetition of each side in the same round, and the CPU seconds that whoever waited in that round took."""

    ours: Repetition
    theirs: Repetition
    idle_cpu_seconds: float

    @property
    def ratio(self) -> float:
        """Their seconds over ours: above 1 where ours is quicker."""
        return self.theirs.seconds / self.ours.seconds


def take(engine: CrewEngine, steps: int) -> Repetition:
    """Steps of one engine while the others are blocked."""
    engine.start(steps)
    return engine.finish()


def _round(engines: Mapping[str, CrewEngine], steps: int, first: int) -> tuple[dict[str, Repetition], float]:
    """Each engine's repetition, beginning with the engine number `first`, and the waiting ones' CPU seconds."""
    names = list(engines)
    found, idle = {}, 0.0
    for name in names[first:] + names[:first]:
        others = [engine.crew for other, engine in engines.items() if other != name]
        before = sum(crew.waiting_cpu_seconds() for crew in others)
        found[name] = take(engines[name], steps)
        idle += sum(crew.waiting_cpu_seconds() for crew in others) - before
    return found, idle


def alternate(
    ours: CrewEngine, theirs: Mapping[str, CrewEngine], *, pairs: int, steps: int, warmup: int = 2
) -> dict[str, list[Pair]]:
    """Repetitions of `steps` steps in turn, each time beginning with another engine, after `warmup` steps of all.

    Turns, because a shared machine's speed drifts; other beginnings, because who comes second finds other caches.
    Returns the pairs with each of `theirs`.
    """
    engines = {"": ours, **theirs}
    for engine in engines.values():
        take(engine, warmup)
    rounds = [_round(engines, steps, number % len(engines)) for number in range(pairs)]
    return {name: [Pair(found[""], found[name], idle) for found, idle in rounds] for name in theirs}


def median_ratio(pairs: Sequence[Pair]) -> float:
    """The median over pairs of their seconds over ours."""
    return statistics.median(pair.ratio for pair in pairs)


def loss_differs(pairs: Sequence[Pair]) -> float:
    """The largest relative difference of the two sides' losses over the first timed steps, at most COMPARED_STEPS: from
    equal to seven digits in the first one, the two roundings of fp32 training drift apart for good some steps later."""
    both = [pair for p in pairs for pair in zip(p.ours.losses, p.theirs.losses, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in both[:COMPARED_STEPS])


def loss_fell(pairs: Sequence[Pair]) -> float:
    """By how much the loss of the last timed step is below the first's, in nats per token: training did happen."""
    return pairs[0].theirs.losses[0] - pairs[-1].theirs.losses[-1]


def idle_ratio(pairs: Sequence[Pair]) -> float:
    """CPU seconds of the waiting sides over those of the working ones."""
    worked = sum(p.ours.cpu_seconds + p.theirs.cpu_seconds for p in pairs)
    return sum(p.idle_cpu_seconds for p in pairs) / worked


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of repetitions."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {
        "median": middle,
        "lower_quartile": low,
        "upper_quartile": high,
        "least": min(values),
        "most": max(values),
    }


def raw_of(pairs: Sequence[Pair], steps: int) -> dict[str, object]:
    """What a result file keeps of a comparison: seconds of a step, CPU seconds of a step, ratios, checks."""
    sides = {"ours": [p.ours for p in pairs], "theirs": [p.theirs for p in pairs]}
    return {
        "ratio": spread([p.ratio for p in pairs]),
        "step_seconds": {k: [r.seconds / steps for r in side] for k, side in sides.items()},
        "cpu_seconds": {k: [r.cpu_seconds / steps for r in side] for k, side in sides.items()},
        "ratios": [p.ratio for p in pairs],
        "steps_per_repetition": steps,
        "loss_first": pairs[0].theirs.losses[0],
        "loss_last": pairs[-1].theirs.losses[-1],
        "loss_differs": loss_differs(pairs),
        "idle_ratio": idle_ratio(pairs),
    }
