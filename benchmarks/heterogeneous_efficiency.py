"""Unlike devices in one job against the same devices in jobs of their own, and against the physical bound.

Eight emulated devices of three types train one model in four pipelines, each of which crosses two types by its layers
(`specs/three-types.yaml`; no type holds the model on one device). Then every type trains alone with its own best plan
and its share of the batch, the three side by side, so that the machine is loaded alike. The same again over slow links
(`specs/three-types-slow-link.yaml`). All step times are measured, the median of the steps after the warm-up.

The cheapest cheats, and what makes them fail:
- slow rivals: each type's own plan is the better of an exhaustive search and the planner's, and its measured run must
  reach MIN_PHYSICAL_ALONE of its own physical bound and nearly all of its prediction;
- fewer tokens: every step must run every listed action, the plan must be valid (each row of the batch once), and the
  losses must be those of the same training in one process;
- devices that end early: no measured compute action may be shorter than its price, no message quicker than its link;
- math that does not fit its time: of the mixed run, at most 5 % of the compute time is real
  math and at most 1 % of the actions overrun;
- one pipeline per type, which would be the rival itself: every pipeline must hold decoders on two types;
- no bubble to speak of, because the plan is another: stages, micro-batches and tensor-parallel degree are asserted;
- actions so long that overhead vanishes are bounded by the benchmark's own length; none may be under 15 ms;
- links that are not slow: the transfer's and the gradients' parts are asserted from program and prices.

Last, really unequal devices: CPU workers under quotas of a core (`bench/quota.py`), skipped where none can be set.

    .venv/bin/python benchmarks/heterogeneous_efficiency.py              # about eleven minutes; writes the result file
    .venv/bin/python benchmarks/heterogeneous_efficiency.py --only NAME  # emulated, slow_link or cpu_quota alone
    .venv/bin/python benchmarks/heterogeneous_efficiency.py --predict    # the simulator's answer, in seconds
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.results import print_figures, write_result
from bench.splits import Candidate, Chain, best_alone, best_chains, compute_of, only, share_of_batch
from hethub.cost.bounds import physical_step_seconds
from hethub.program.actions import Program, What
from hethub.program.compile import compile_program
from hethub.specs.cluster import Cluster, load_cluster
from hethub.specs.layout import lay_out
from hethub.specs.workload import Workload
from hethub.timeline.record import Kind

CPU_QUOTA = "cpu_quota"
SPECS = Path(__file__).parent / "specs"
VARIANTS = {"emulated": "three-types.yaml", "slow_link": "three-types-slow-link.yaml"}
STEPS, WARM_UP = 3, 1
MIN_PHYSICAL_ALONE = 0.93
MOST_STAGES, FEWEST_MICRO_BATCHES, MOST_RANKS = 3, 40, 2
SHORTEST_ACTION_SECONDS = 0.015
SLOW_TRANSFER, SLOW_GRADIENTS = 0.2, 0.5


@dataclass(frozen=True)
class Contest:
    """The plan for all devices, and every type's own."""

    mixed: Candidate
    alone: dict[str, Candidate]


def main() -> int:
    """Plan, run, check, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="simulate only")
    parser.add_argument("--only", choices=[*VARIANTS, CPU_QUOTA], help="run one part, write nothing")
    parser.add_argument("--skip", choices=[CPU_QUOTA], help="leave a part out; the result file says so")
    options = parser.parse_args()
    parts = [part for part in (*VARIANTS, CPU_QUOTA) if part != options.skip]
    chosen = parts if options.only is None else [options.only]
    contests = {name: plan_contest(*_load(SPECS / VARIANTS[name])) for name in chosen if name in VARIANTS}
    for name, contest in contests.items():
        print_figures({f"predicted {key} {name}": share for key, share in predicted(contest).items()})
    wrong = [text for name, contest in contests.items() for text in unfit(contest, slow=name == "slow_link")]
    figures: dict[str, float] = {}
    raw: dict[str, Any] = {}
    if not options.predict and not wrong:
        wrong += _run(contests, figures, raw)
        if CPU_QUOTA in chosen:
            wrong += _run_cpu_quota(figures, raw)
        elif options.skip is not None:
            raw[CPU_QUOTA] = {"skipped": "by --skip"}
        print_figures(figures)
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if raw and not wrong and options.only is None:
        print(f"wrote {write_result('heterogeneous_efficiency', figures, raw, emulated=True)}")
    return 1 if wrong else 0


def _load(path: Path) -> tuple[Cluster, Workload]:
    cluster, workload = load_cluster(path)
    assert workload is not None
    return cluster, workload


# --- plans ------------------------------------------------------------------------------------------------------


def plan_contest(cluster: Cluster, workload: Workload) -> Contest:
    """The best plan of the wanted shape for all devices, and every type's own best."""
    return Contest(
        best_chains(cluster, workload, _crossing(cluster, workload), cluster.name),
        {
            name: best_alone(only(cluster, name), share_of_batch(cluster, workload, name))
            for name in cluster.device_types
        },
    )


def _crossing(cluster: Cluster, workload: Workload) -> Iterator[tuple[Chain, ...]]:
    """Two pipelines from a fast to a slow device and two from a middle to a slow one, cut anywhere."""
    names = {
        name: [device.name for device in cluster.devices() if device.type.name == name]
        for name in cluster.device_types
    }
    batch, layers = workload.global_batch, workload.model.layers + 2
    half = batch // 2
    for fast_cut in range(2, layers - 1):
        for middle_cut in range(2, layers - 1):
            for fast_share in range(FEWEST_MICRO_BATCHES, half - FEWEST_MICRO_BATCHES + 1):
                yield tuple(
                    Chain((names[kind][number], names["slow"][place]), (cut,), micro_batches)
                    for place, (kind, number, cut, micro_batches) in enumerate(
                        [
                            ("fast", 0, fast_cut, fast_share),
                            ("fast", 1, fast_cut, fast_share),
                            ("middle", 0, middle_cut, half - fast_share),
                            ("middle", 1, middle_cut, half - fast_share),
                        ]
                    )
                )


def predicted(contest: Contest) -> dict[str, float]:
    """The figures as the simulator sees them."""
    mixed = contest.mixed
    rows = sum(c.plan.workload.global_batch / c.step_seconds for c in contest.alone.values())
    return {
        "homogeneous_share": mixed.plan.workload.global_batch / mixed.step_seconds / rows,
        "physical_share": physical_step_seconds(compute_of(mixed.plan)) / mixed.step_seconds,
    }


def unfit(contest: Contest, *, slow: bool) -> list[str]:
    """What about the plan for all devices is not what the benchmark is of."""
    return list(_unfit(contest.mixed, slow=slow))


def _unfit(mixed: Candidate, *, slow: bool) -> Iterator[str]:
    compute = compute_of(mixed.plan)
    program = compile_program(lay_out(mixed.plan), compute)
    devices = compute.graph.devices
    decoders = range(1, mixed.plan.workload.model.layers + 1)
    if len({device.type.name for device in devices}) != 3 or len(program.layout.used) != 8:
        yield "the plan does not use eight devices of three types"
    for pipeline in program.layout.pipelines:
        crossed = {
            devices[device].type.name
            for stage in pipeline.stages
            if any(layer in decoders for layer in range(*stage.layers))
            for device in stage.devices()
        }
        if len(crossed) < 2:
            yield f"pipeline {pipeline.index} holds decoders on {crossed} only"
        if len(pipeline.stages) > MOST_STAGES or pipeline.micro_batches < FEWEST_MICRO_BATCHES:
            shape = f"{len(pipeline.stages)} stages and {pipeline.micro_batches} micro-batches"
            yield f"pipeline {pipeline.index} has {shape}"
        if any(len(r.ranks) > MOST_RANKS for stage in pipeline.stages for r in stage.replicas):
            yield f"pipeline {pipeline.index} has a tensor-parallel degree above {MOST_RANKS}"
    if slow:
        parts = slow_parts(program, mixed)
        if parts["transfer_over_forward"] < SLOW_TRANSFER:
            yield f"no boundary's transfer takes {SLOW_TRANSFER} of its stage's forward time: {parts}"
        if parts["gradients_over_backward"] < SLOW_GRADIENTS:
            yield f"gradients keep no link for {SLOW_GRADIENTS} of the last backward: {parts}"


def slow_parts(program: Program, mixed: Candidate) -> dict[str, float]:
    """How slow the links are: the slowest boundary's transfer over the forward time of the stage that sends it, and the
    time that gradients keep the busiest capacity of the links over the longest backward of a stage."""
    compute = compute_of(mixed.plan)
    forward: dict[int, float] = {}
    backward = 0.0
    for stage in (stage for pipeline in program.layout.pipelines for stage in pipeline.stages):
        for replica in stage.replicas:
            rows = replica.rows[1] - replica.rows[0]
            for rank in replica.ranks:
                price = compute.group_price(replica.ranks, stage.layers, rows, Kind.FORWARD)
                forward[rank.device] = price.seconds
            price = compute.group_price(replica.ranks, stage.layers, rows, Kind.BACKWARD)
            backward = max(backward, price.seconds)
    boundary = 0.0
    cells: Counter[int] = Counter()
    for message in program.messages:
        transfer = program.transfers[message.transfer]
        path = compute.graph.path(transfer.source, transfer.destination)
        if transfer.what == What.ACTIVATION:
            boundary = max(boundary, path.seconds(transfer.bytes) / forward[transfer.source])
        elif transfer.what == What.REDUCE:
            cells.update({cell: transfer.bytes / bandwidth for cell, bandwidth in path.cells})
    return {
        "transfer_over_forward": boundary,
        "gradients_over_backward": max(cells.values()) / backward,
    }


# --- runs -------------------------------------------------------------------------------------------------------


def _run(contests: dict[str, Contest], figures: dict[str, float], raw: dict[str, Any]) -> list[str]:
    """Measure every contest; adds to `figures` and `raw`, returns what is wrong with them."""
    if not contests:
        return []
    # Loaded here: a process that a pool starts reads this file too and has no need of it.
    from bench.emulated import Pool, Run, measure, problems

    wrong: list[str] = []
    counts = next(iter(contests.values())).mixed.plan.cluster.counts()
    with ExitStack() as stack:

        def start(size: int) -> Pool:
            return stack.enter_context(closing(Pool(size)))

        def side_by_side(contest: Contest) -> dict[str, Run]:
            with ThreadPoolExecutor(len(pools)) as threads:
                jobs = {
                    name: threads.submit(measure, pools[name], own.plan, steps=STEPS, warm=WARM_UP)
                    for name, own in contest.alone.items()
                }
                return {name: job.result() for name, job in jobs.items()}

        everyone, pools = start(sum(counts.values())), {name: start(count) for name, count in counts.items()}
        for name, contest in contests.items():
            mixed = measure(everyone, contest.mixed.plan, steps=STEPS, warm=WARM_UP)
            alone = side_by_side(contest)
            figures[f"homogeneous_share_{name}"] = mixed.tokens_per_second / sum(
                own.tokens_per_second for own in alone.values()
            )
            figures[f"physical_share_{name}"] = mixed.physical_share
            raw[name] = {
                "mixed": mixed.as_raw(),
                "alone": {own: run.as_raw() for own, run in alone.items()},
                "links": slow_parts(mixed.program, contest.mixed),
            }
            for who, run in {"together": mixed, **alone}.items():
                print(f"{name}, {who}: {run.physical_share:.4f} of the physical bound. Where the time went:")
                print_figures({f"  {cause}": share for cause, share in run.losses_of_time.total.items()})
                wrong += problems(run, rival=run is not mixed)
            wrong += [
                f"{own} alone reaches {run.physical_share:.4f} of its bound, less than {MIN_PHYSICAL_ALONE}"
                for own, run in alone.items()
                if run.physical_share < MIN_PHYSICAL_ALONE
            ]
            if (shortest := mixed.shortest_action_seconds()) < SHORTEST_ACTION_SECONDS:
                wrong.append(f"{name}: an action of {shortest:.4f} s is too short")
    return wrong


def _run_cpu_quota(figures: dict[str, float], raw: dict[str, Any]) -> list[str]:
    """Real devices of unequal speed; adds to `figures` and `raw`, returns what is wrong with them."""
    from bench.quota import QUOTA_ERROR, cpu_quota_share

    found, raw[CPU_QUOTA] = cpu_quota_share()
    figures.update(found)
    if "skipped" in raw[CPU_QUOTA]:
        print(f"cpu_quota: skipped, {raw[CPU_QUOTA]['skipped']}")
    elif found["quota_error"] > QUOTA_ERROR:
        return [f"cpu_quota: a worker's CPU time is off its quota by {found['quota_error']:.3f}"]
    return []


if __name__ == "__main__":
    sys.exit(main())
