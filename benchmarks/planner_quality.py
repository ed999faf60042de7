"""How good plans are against published planners, under the same cost assumptions, and under our own.

*Theirs*: the problems of Sailor's paper (`cluster_problems.json`), priced by its simulator's rules from its artifact's
tables. Our search, and our own implementations of the search ideas of Sailor and of Metis, all judged by one function.
`sailor_ratio_*` are ours over the throughput that Sailor's paper reports, and `sailor_bound_*` what no plan of our
space there can exceed, over the same; `mixes_*_ratio` ours over the better of both implementations, on the 1:1 mixes
and the five-zone problems, and `mixes_bound_median` the median of what no plan of our space can exceed, over the same.
They say little unless the implementations reach what the papers report: `sailor_like_error` and `metis_like_error` are
their largest relative differences from that line.
*Ours*: the clusters of OWN, our planner and all baselines, judged by our simulator (`hethub compare`); the shares
of the bounds and the proven gaps of `bench/planner_shares.py`; and what simulating few candidates costs, of
`bench/planner_finalists.py`.

The cheapest cheats, and what makes them fail:
- a plan of more devices than there are, too few rows, or stages that do not fit: `problems` counts again;
- a price of our own for our own plans: every split is priced by `price_split`, and on one pipeline of alike replicas
  that must give what `sailor_step_seconds` gives, the formula that reproduces the published simulator (`same_judge`);
- a feeble Sailor: its implementation must reach what is published (`sailor_like_error` at most VALID);
- a bound that is none, so that little seems possible: it is searched for up to steps BEYOND times ours, and our plan of
  any problem must not be above it.

    .venv/bin/python benchmarks/planner_quality.py --data DIR          # some minutes; writes the result file
    .venv/bin/python benchmarks/planner_quality.py --data DIR --small  # the three published lines; writes nothing

The result holds only what we computed, no measurement of the data.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.planner_finalists import finalist_losses
from bench.planner_shares import planner_shares
from bench.results import ROOT, print_figures, write_result
from hethub.cost.engines import DEEPSPEED, EngineRun, ReplicaGroup, RunStage
from hethub.planners.baselines.comparison import compare
from hethub.planners.baselines.deadline_search import deadline_search, least_seconds
from hethub.planners.baselines.metis_like import metis_like
from hethub.planners.baselines.prices import Prices, price_split, split_fits
from hethub.planners.baselines.problems import PublishedProblem, load_problems
from hethub.planners.baselines.published import PublishedPrices, load_cloud_links
from hethub.planners.baselines.sailor_like import sailor_like
from hethub.planners.baselines.split import Band, Group, Side, Split
from hethub.planners.interface import Problem
from hethub.simulate.imported_runs import opt_model
from hethub.simulate.sailor import SailorCosts, load_sailor_costs, sailor_step_seconds
from hethub.specs.cluster import load_problem

# What the papers' searches reach on these problems: Sailor's SOSP 2025 paper, iterations per second and search seconds.
PUBLISHED = {
    "128": {"problem": "a100-v100-1to3-128", "sailor": 0.170, "metis": 0.124, "seconds": 1.2},
    "320": {"problem": "a100-v100-1to3-320", "sailor": 0.361, "metis": 0.251, "seconds": 3.0},
    "512": {"problem": "a100-v100-1to3-512", "sailor": 0.523, "metis": 0.441, "seconds": 6.7},
}
MIXES = ("a100-v100-1to1-", "a100-geo5-")
OWN = ("laptop", "a100-v100", "six-vendors", "hethub-768")
VALID = 0.05
BEYOND = 1.1
SEARCHES: dict[str, Callable[[Prices], Split | None]] = {
    "ours": lambda prices: None if (found := deadline_search(prices)) is None else found.split,
    "sailor_like": lambda prices: next((split for _, split in sailor_like(prices)), None),
    "metis_like": lambda prices: next((split for _, split in metis_like(prices, cut_nodes=True)), None),
}


def main() -> int:
    """Search every problem with every planner, check, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder with cluster_problems.json and the artifact's tables"
    )
    parser.add_argument("--small", action="store_true", help="the three published lines only; write nothing")
    options = parser.parse_args()
    if options.data is None:
        print("skipped: planner_quality needs the published problems; give --data DIR")
        return 0
    published = load_problems(options.data / "cluster_problems.json")
    costs = load_sailor_costs(options.data)
    links = load_cloud_links(options.data / "link_bandwidth.csv")
    lines = [str(line["problem"]) for line in PUBLISHED.values()]
    names = [*lines, *(() if options.small else (n for n in published if n.startswith(MIXES)))]
    found: dict[str, dict[str, Any]] = {}
    bounds: dict[str, float] = {}  # iterations per second that no plan of our space exceeds
    for name in names:
        prices = PublishedPrices(published[name], costs, links)
        found[name] = {planner: run(search, prices) for planner, search in SEARCHES.items()}
        bounds[name] = 1 / least_seconds(prices, BEYOND / found[name]["ours"]["iterations_per_second"])
        print(line_of(name, found[name], bounds[name]))
    figures = ratios(found, bounds)
    wrong = list(problems(found, bounds, figures, published, costs, links))
    raw: dict[str, Any] = {"theirs": {name: without_splits(entry) for name, entry in found.items()}}
    raw["theirs_bounds"] = bounds
    if not options.small:
        raw["ours"] = {name: own_mode(name) for name in OWN}
        shares, raw["shares"], unproven = planner_shares()
        losses, raw["finalists"], few = finalist_losses()
        figures |= shares | losses
        wrong += unproven + few
    print_figures(figures)
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong and not options.small:
        print(f"wrote {write_result('planner_quality', figures, raw, emulated=False)}")
    return 1 if wrong else 0


def run(search: Callable[[Prices], Split | None], prices: Prices) -> dict[str, Any]:
    """What a search finds, in how many seconds, prices of stages included."""
    begin = time.perf_counter()
    split = search(prices)
    seconds = time.perf_counter() - begin
    speed = 0.0 if split is None else 1 / price_split(prices, split).step_seconds
    return {"iterations_per_second": speed, "search_seconds": seconds, "split": split}


def line_of(name: str, entry: dict[str, dict[str, Any]], bound: float) -> str:
    """One line of the table: iterations per second and search seconds, ours and the bound over the better of the
    others."""
    cells = (f"{p} {r['iterations_per_second']:.4f} ({r['search_seconds']:.2f} s)" for p, r in entry.items())
    ours = float(entry["ours"]["iterations_per_second"])
    return f"{name:24} {'  '.join(cells)}  ours x {ours / better(entry):.4f}  bound x {bound / better(entry):.4f}"


def better(entry: dict[str, dict[str, Any]]) -> float:
    """Iterations per second of the better of the published searches."""
    return max(float(entry[planner]["iterations_per_second"]) for planner in ("sailor_like", "metis_like"))


def ratios(found: dict[str, dict[str, Any]], bounds: dict[str, float]) -> dict[str, float]:
    """The figures."""

    def speed(name: str, planner: str) -> float:
        return float(found[name][planner]["iterations_per_second"])

    figures = {
        f"sailor_ratio_{size}": speed(str(line["problem"]), "ours") / float(line["sailor"])
        for size, line in PUBLISHED.items()
    }
    for size, line in PUBLISHED.items():
        figures[f"sailor_bound_{size}"] = bounds[str(line["problem"])] / float(line["sailor"])
    for planner in ("sailor", "metis"):
        figures[f"{planner}_like_error"] = max(
            abs(speed(str(line["problem"]), f"{planner}_like") / float(line[planner]) - 1)
            for line in PUBLISHED.values()
        )
    mixes = [name for name in found if name.startswith(MIXES)]
    if mixes:
        over_better = [speed(name, "ours") / better(found[name]) for name in mixes]
        over_sailor = [speed(name, "ours") / speed(name, "sailor_like") for name in mixes]
        figures["mixes_min_ratio"] = min(over_better)
        figures["mixes_median_ratio"] = statistics.median(over_better)
        figures["mixes_bound_median"] = statistics.median(bounds[n] / better(found[n]) for n in mixes)
        figures["mixes_median_ratio_over_sailor_like"] = statistics.median(over_sailor)
    return figures


def problems(
    found: dict[str, dict[str, Any]],
    bounds: dict[str, float],
    figures: dict[str, float],
    published: dict[str, PublishedProblem],
    costs: SailorCosts,
    links: Any,
) -> Iterator[str]:
    """What makes the figures worthless."""
    for name, entry in found.items():
        prices = PublishedPrices(published[name], costs, links)
        for planner, result in entry.items():
            split = result["split"]
            if split is None:
                continue
            if not split_fits(prices, split):
                yield f"{name}: the plan of {planner} uses devices or memory that are not there"
            if split.total_rows < prices.batch:
                yield f"{name}: the plan of {planner} does {split.total_rows} of {prices.batch} rows"
            for band in split.bands:
                if len({sum(side.rows * side.replicas for side in stage) for stage in band.stages}) > 1:
                    yield f"{name}: stages in the plan of {planner} do unlike rows"
    yield from beyond(found, bounds)
    error = figures["sailor_like_error"]
    if error > VALID:
        yield f"the Sailor-like planner is {error:.1%} off what is published"
    difference = same_judge(costs, published["a100-128"], links)
    if difference > 1e-9:
        yield f"splits are priced {difference:.2e} unlike the published simulator's formula"


def beyond(found: dict[str, dict[str, Any]], bounds: dict[str, float]) -> Iterator[str]:
    """Searches that took longer than Sailor's, and bounds that are none."""
    for line in PUBLISHED.values():
        entry, most = found[str(line["problem"])]["ours"], float(line["seconds"])
        if entry["search_seconds"] > most:
            yield f"{line['problem']}: our search took {entry['search_seconds']:.2f} s, Sailor's {most} s"
    for name, entry in found.items():
        if entry["ours"]["iterations_per_second"] > bounds[name] * (1 + 1e-9):
            yield f"{name}: our plan is better than its bound allows"


def same_judge(costs: SailorCosts, problem: PublishedProblem, links: Any) -> float:
    """The relative difference between `price_split` and `sailor_step_seconds` on pipelines of alike replicas."""
    prices = PublishedPrices(problem, costs, links)
    device_type, zone = problem.kinds[0].device_type, next(iter(problem.zones.values()))[0]
    worst = 0.0
    for bounds in ((0, 14, 26), (0, 9, 18, 26), (0, 6, 13, 20, 26)):
        for degree in problem.kinds[0].degrees:
            group = Group(0, degree)
            split = Split(bounds, (Band(((Side(group, 2, 4),),) * (len(bounds) - 1), 8),))
            ends = [(device_type, zone, count) for count in {1, degree}]
            coefficients = {end[2]: tuple(links.between(end, end)[:3]) for end in ends}
            same_links = {(device_type, device_type, count): c for count, c in coefficients.items()}
            stages = tuple(RunStage(layers, (ReplicaGroup(device_type),) * 4) for layers in split.layers)
            engine_run = EngineRun(
                name="check",
                engine=DEEPSPEED,
                model=opt_model(degree),
                sequence_length=2048,
                dtype="fp32",
                tensor_parallel=degree,
                micro_batch=2,
                micro_batches=8,
                stages=stages,
            )
            theirs = sailor_step_seconds(engine_run, SailorCosts(costs.times, same_links, costs.memory))
            worst = max(worst, abs(price_split(prices, split).step_seconds / theirs - 1))
    return worst


def without_splits(entry: dict[str, Any]) -> dict[str, Any]:
    """Speeds, seconds, and splits as text."""
    return {planner: {**result, "split": repr(result["split"])} for planner, result in entry.items()}


def own_mode(name: str) -> list[dict[str, Any]]:
    """Our planner and the baselines under our cost model."""
    cluster, workload = load_problem(ROOT / "cluster_specs" / f"{name}.yaml")
    results = compare(Problem.of(cluster, workload))
    best = results[0].tokens_per_second
    print(f"{name}: " + "  ".join(f"{r.name} {r.tokens_per_second / best:.1%}" for r in results))
    return [
        {
            "name": result.name,
            "tokens_per_second": result.tokens_per_second,
            "search_seconds": result.search_seconds,
            "failure": result.failure,
        }
        for result in results
    ]


if __name__ == "__main__":
    sys.exit(main())
