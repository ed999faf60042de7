"""What it costs that few candidates are simulated: on random small clusters, the step of the planner's first finalist
over the shortest that any of the ranked candidates has under any schedule, at any depth.

The cheapest cheats, and what makes them fail: a referee that looks at what the planner looked at (at least LEAST
variants must be simulated for each that the planner simulated); clusters without a choice (of one type, or of few
devices: `drawn` draws until there are two types and FEWEST devices).
"""

from __future__ import annotations

import random
import statistics
from dataclasses import replace
from typing import Any

from bench.results import ROOT
from hethub.planners.candidate import Candidate
from hethub.planners.chain import Chains
from hethub.planners.finalists import run_off
from hethub.planners.first import FirstPlanner
from hethub.planners.interface import Problem
from hethub.planners.search import with_reach
from hethub.specs.cluster import Planning, load_planning
from hethub.specs.resolved import Cluster

__all__ = ["finalist_losses"]

CLUSTERS = 40
SEED = 7
FEWEST = 4  # devices
LEAST = 5
SCHEDULES = ("1f1b-split", "list", "zb-h1", "1f1b")
REACHES = (0, 1, 2)


def finalist_losses() -> tuple[dict[str, float], dict[str, Any], list[str]]:
    """(Figures `finalists_mean_loss` and `finalists_worst_loss`, what is behind them, what makes them worth
    nothing)."""
    told, random_ = load_planning(ROOT / "cluster_specs" / "laptop.yaml"), random.Random(SEED)
    runs: list[dict[str, Any]] = []
    while len(runs) < CLUSTERS:
        run = _one(told, drawn(told.cluster, random_), random_.choice((8, 16, 24, 32, 64)))
        if run is not None:
            runs.append(run)
    losses = [run["loss"] for run in runs]
    simulated, variants = (sum(run[key] for run in runs) for key in ("simulated", "variants"))
    figures = {"finalists_mean_loss": statistics.mean(losses), "finalists_worst_loss": max(losses)}
    few = f"the referee simulated {variants} variants, the planner {simulated}"
    return figures, {"clusters": runs}, [few] if variants < LEAST * simulated else []


def drawn(cluster: Cluster, random_: random.Random) -> Cluster:
    """The cluster with other speeds, memories, links and numbers of devices."""
    while True:
        types = {
            name: replace(
                device_type,
                memory_bytes=int(device_type.memory_bytes * random_.choice((1, 1.5, 2, 4))),
                peak_flops_per_second={
                    dtype: peak * random_.uniform(0.4, 2.5)
                    for dtype, peak in device_type.peak_flops_per_second.items()
                },
                memory_bandwidth_bytes_per_second=device_type.memory_bandwidth_bytes_per_second
                * random_.uniform(0.5, 2),
            )
            for name, device_type in cluster.device_types.items()
        }
        groups = []
        for group in cluster.node_groups:
            quicker = random_.choice((0.5, 1, 3, 10))
            intra, inter = (
                replace(link, bandwidth_bytes_per_second=quicker * link.bandwidth_bytes_per_second)
                for link in (group.intra_link, group.inter_link)
            )
            nodes, each = random_.choice((1, 1, 2)), random_.choice((1, 2, 2, 4))
            groups.append(
                replace(group, nodes=nodes, devices_per_node=each, intra_link=intra, inter_link=inter)
            )
        found = replace(cluster, device_types=types, node_groups=tuple(groups))
        if sum(map(bool, found.counts().values())) > 1 and sum(found.counts().values()) >= FEWEST:
            return found


def _one(told: Planning, cluster: Cluster, batch: int) -> dict[str, Any] | None:
    """One cluster; None where nothing fits, or where plans are simulated in part."""
    problem = Problem.of(cluster, replace(told.workload, global_batch=batch), constraints=told.constraints)
    planner = FirstPlanner()
    choice = planner.choose(problem)
    if choice is None or choice.finalists[0].modelled is None:
        return None
    chosen, chains = choice.finalists[0], planner.chains(problem)
    steps = [step for candidate in choice.ranking.candidates for step in _steps(chains, candidate, problem)]
    least = min([chosen.step_seconds, *steps])
    return {
        "devices": sum(cluster.counts().values()),
        "step_seconds": chosen.step_seconds,
        "least_seconds": least,
        "loss": chosen.step_seconds / least - 1,
        "simulated": choice.simulated,
        "variants": len(steps),
    }


def _steps(chains: Chains, candidate: Candidate, problem: Problem) -> list[float]:
    """Simulated steps of a candidate under all schedules, at all depths that fit."""
    batch = problem.workload.global_batch
    depths = [with_reach(chains, candidate, batch, reach) for reach in REACHES if reach != candidate.reach]
    variants = [
        replace(one, schedule=schedule)
        for one in (candidate, *depths)
        if one is not None
        for schedule in SCHEDULES
    ]
    return [
        finalist.step_seconds for one in variants for finalist in run_off([one], problem, chains.costs.pools)
    ]
