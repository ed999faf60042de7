"""Our runtime against PyTorch's own engines, on equal workers, and on unequal ones, where theirs must split evenly.

Equal devices: two CPU workers of one thread each, nothing emulated, the same model, data and optimizer on both sides; a
figure is the median over pairs of (their seconds / our seconds) of whole optimizer steps, so above 1 ours is quicker.

    pipeline_ratio         our even 1F1B, against torch.distributed.pipelining's Schedule1F1B
    data_parallel_ratio    against DistributedDataParallel (gradients in the buckets, static graph)
    zero1_ratio            our updaters, against ZeroRedundancyOptimizer on DistributedDataParallel
    tensor_parallel_ratio  against torch.distributed.tensor.parallel (sequence parallel, loss parallel)

Unequal devices: four CPU workers under CPU quotas of 0.6, 0.6, 0.3 and 0.15 of a core. Even splits wait for the slowest
there, so 1.65 / (4 x 0.15) = 2.75 is the ideal.

    speedup_over_ddp            our plan, against DistributedDataParallel with equal rows
    speedup_over_even_pipeline  our plan, against torch.distributed.pipelining with equal layers

Torch's side is an nn.Module of torch's own functions (`bench/llama.py`), which are a little quicker than our model's;
its settings are the best of those tried (`bench/torch_engines.py`).

The cheapest cheats, and what makes them fail:
- to skip work (rows, a micro-batch, clipping, an update, or old weights used once more): the other side would train
  differently, and `loss_differs` over the first 20 timed steps is held to LOSS_DIFFERS;
- not to train at all on either side: the loss must fall (`loss_fell`);
- to leave work behind when a repetition ends, or to slow the other side by busy waiting: CPU time of the waiting side
  counts, and `idle_ratio` is held to IDLE_RATIO;
- quotas that do not hold, or hold unevenly: the CPU time that each worker gets, measured in the run, is held to its
  quota (`quota_error`);
- to keep a figure whose check failed: it is left out of the figures, and `not_valid` in the result file says why;
- to choose the repetition: the figure is the median of all of them, and all stand in the result file.

    .venv/bin/python benchmarks/against_torch.py              # all, about 15 minutes; writes the result file
    .venv/bin/python benchmarks/against_torch.py --only NAME  # one part, nothing written
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.engines import (
    Ours,
    Pair,
    Training,
    alternate,
    idle_ratio,
    loss_differs,
    loss_fell,
    median_ratio,
    raw_of,
    text_of,
)
from bench.plans import cpu_cluster, data_parallel, llama_model, pipeline, tensor_parallel
from bench.quota import (
    CpuQuotas,
    core_shares,
    mixed_plan,
    settled_quotas,
    why_no_quotas,
)
from bench.results import print_figures, write_result
from bench.torch_engines import DataParallel, Pipelining, TensorParallel, Theirs, ZeroOptimizer
from hethub.specs.plan import Plan

LOSS_DIFFERS = 1e-4  # relative, both sides in fp32
IDLE_RATIO = 0.01
PAIRS = 9
STEPS = 4  # a repetition ends with all new weights in place, which in training overlaps with the next step
EDGE_PAIRS = 5  # of the settings beside the figures
BUCKET_MEBIBYTES = 25.0  # torch's default
EVEN_CUTS = (
    0,
    2,
    3,
    4,
    6,
)  # of the quotas' model: a decoder each, the embedding and the head with the outer two
UNEQUAL_MICRO_BATCHES = 2
EVEN_MICRO_BATCHES = 44  # as many rows of 4
UNEQUAL_STEPS = 1  # a repetition; the even ones take over 20 s each
UNEQUAL = "unequal_devices"
TWO_CORES = (("core", 1.0, 2),)
MODEL = llama_model(hidden=384, layers=6, heads=6)
SEQUENCE = 128

Baseline = Callable[[Training], AbstractContextManager[Theirs]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One comparison on equal devices: our plan and the torch engine that does the same."""

    plan: Plan
    theirs: Baseline
    words: str


def two_pipelines(rows: int, micro_batches: int, sequence_length: int = SEQUENCE) -> Setting:
    """An even cut in two."""
    cuts = (0, 1 + MODEL.layers // 2, MODEL.layers + 2)
    return Setting(
        plan=pipeline(cpu_cluster(TWO_CORES), MODEL, sequence_length, cuts, rows, micro_batches),
        theirs=lambda training: Theirs(Pipelining, training, 2, cuts=cuts, micro_batches=micro_batches),
        words=f"2 stages, {micro_batches} micro-batches of {rows} x {sequence_length} tokens",
    )


def two_replicas(
    side: type[DataParallel], rows: int, micro_batches: int = 1, sequence_length: int = SEQUENCE
) -> Setting:
    """The whole model twice."""
    return Setting(
        plan=data_parallel(cpu_cluster(TWO_CORES), MODEL, sequence_length, [rows, rows], micro_batches),
        theirs=lambda training: Theirs(
            side, training, 2, bucket_mebibytes=BUCKET_MEBIBYTES, micro_batches=micro_batches
        ),
        words=f"2 replicas, {micro_batches} micro-batches of 2 x {rows} x {sequence_length} tokens",
    )


def two_shares(rows: int, micro_batches: int = 1, sequence_length: int = SEQUENCE) -> Setting:
    """Every layer cut in two."""
    return Setting(
        plan=tensor_parallel(cpu_cluster(TWO_CORES), MODEL, sequence_length, rows, micro_batches),
        theirs=lambda training: Theirs(
            TensorParallel, training, 2, sequence_parallel=True, micro_batches=micro_batches
        ),
        words=f"a group of 2, {micro_batches} micro-batches of {rows} x {sequence_length} tokens",
    )


EQUAL: dict[str, Setting] = {
    "pipeline_ratio": two_pipelines(rows=2, micro_batches=8),
    "data_parallel_ratio": two_replicas(DataParallel, rows=4),
    "zero1_ratio": two_replicas(ZeroOptimizer, rows=4),
    "tensor_parallel_ratio": two_shares(rows=8),
}
# Where our way of doing it should gain most: much overhead or communication for little math.
EDGES: dict[str, Sequence[Setting]] = {
    "pipeline_ratio": (
        two_pipelines(rows=1, micro_batches=32, sequence_length=32),
        two_pipelines(rows=1, micro_batches=2),
    ),
    "data_parallel_ratio": (
        two_replicas(DataParallel, rows=1),
        two_replicas(DataParallel, rows=1, micro_batches=4),
    ),
    "zero1_ratio": (two_replicas(ZeroOptimizer, rows=1),),
    "tensor_parallel_ratio": (two_shares(rows=1), two_shares(rows=1, micro_batches=8, sequence_length=32)),
}


def compare(setting: Setting, text: Path, pairs: int, steps: int) -> list[Pair]:
    """Both engines at once, in turns."""
    training = Training(workload=setting.plan.workload, tokens_file=text)
    with Ours(setting.plan, training) as ours, setting.theirs(training) as theirs:
        return alternate(ours, {"theirs": theirs}, pairs=pairs, steps=steps)["theirs"]


def invalid(pairs: Sequence[Pair]) -> list[str]:
    """Which checks against cheats a comparison fails."""
    checks = {
        "loss_differs": loss_differs(pairs) <= LOSS_DIFFERS,
        "loss_fell": loss_fell(pairs) > 0,
        "idle_ratio": idle_ratio(pairs) <= IDLE_RATIO,
    }
    return [name for name, fine in checks.items() if not fine]


def equal_devices(name: str, text: Path) -> tuple[float, dict[str, Any], list[str]]:
    """The figure, the repetitions behind it, and the checks that failed."""
    setting = EQUAL[name]
    pairs = compare(setting, text, PAIRS, STEPS)
    problems = invalid(pairs)
    edges, above = [], {}
    for edge in EDGES[name]:
        found = compare(edge, text, EDGE_PAIRS, STEPS)
        failed = invalid(found)
        edges.append({"setting": edge.words, "not_valid": failed, **raw_of(found, STEPS)})
        if median_ratio(found) > 1 and not failed:
            above[edge.words] = median_ratio(found)
    raw = {"setting": setting.words, **raw_of(pairs, STEPS), "beside": edges, "where_above_one": above}
    return median_ratio(pairs), raw, problems


def unequal_devices(text: Path) -> tuple[dict[str, float], dict[str, Any], dict[str, list[str]]]:
    """Both speedups under CPU quotas, the repetitions behind them, and the checks that failed; without quotas, none."""
    reason = why_no_quotas()
    if reason is not None:
        return {}, {"skipped": reason}, {}
    plan = mixed_plan(UNEQUAL_MICRO_BATCHES)
    training = Training(workload=plan.workload, tokens_file=text)
    workers = len(core_shares())
    with ExitStack() as stack:
        quotas = stack.enter_context(CpuQuotas(core_shares()))
        check = settled_quotas(quotas, core_shares())
        ours = stack.enter_context(Ours(plan, training))
        theirs = {
            "speedup_over_ddp": stack.enter_context(
                Theirs(
                    DataParallel,
                    training,
                    workers,
                    bucket_mebibytes=BUCKET_MEBIBYTES,
                    micro_batches=UNEQUAL_MICRO_BATCHES,
                )
            ),
            "speedup_over_even_pipeline": stack.enter_context(
                Theirs(Pipelining, training, workers, cuts=EVEN_CUTS, micro_batches=EVEN_MICRO_BATCHES)
            ),
        }
        for engine in (ours, *theirs.values()):
            quotas.place(engine.crew, range(workers))
        found = alternate(ours, theirs, pairs=EDGE_PAIRS, steps=UNEQUAL_STEPS, warmup=1)
    raw: dict[str, Any] = {name: raw_of(pairs, UNEQUAL_STEPS) for name, pairs in found.items()}
    problems = {name: invalid(pairs) for name, pairs in found.items()}
    if not check.holds:
        problems = {name: [*failed, "quota_error"] for name, failed in problems.items()}
    raw["quotas"] = asdict(check)
    return {name: median_ratio(pairs) for name, pairs in found.items()}, raw, problems


def main() -> int:
    """Run, check against the cheats, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*EQUAL, UNEQUAL], help="one part; nothing is written")
    only = parser.parse_args().only
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # ends processes and quotas too
    figures: dict[str, float] = {}
    raw: dict[str, Any] = {}
    problems: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="hethub-bench-") as folder:
        text = text_of(Path(folder))
        for name in EQUAL if only is None else [only] if only in EQUAL else []:
            figures[name], raw[name], problems[name] = equal_devices(name, text)
            print_figures({name: figures[name]}, [name] if problems[name] else [])
            for edge in raw[name]["beside"]:
                failed = f", not valid: {', '.join(edge['not_valid'])}" if edge["not_valid"] else ""
                print(f"    {edge['ratio']['median']:.4g} with {edge['setting']}{failed}")
        if only in (None, UNEQUAL):
            found, raw[UNEQUAL], checks = unequal_devices(text)
            figures.update(found)
            problems.update(checks)
            print_figures(found, [name for name, failed in checks.items() if failed])
            if not found:
                print(f"{UNEQUAL}: skipped: {raw[UNEQUAL]['skipped']}")
    problems = {name: failed for name, failed in problems.items() if failed}
    for name, failed in problems.items():
        print(f"{name}: not valid, because of {', '.join(failed)}")
        figures.pop(name, None)
    if not only:
        write_result("against_torch", figures, {**raw, "not_valid": problems}, emulated=False)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
