"""How much of the gradient reduction the backward pass does not hide.

Four emulated devices hold one stage of 24 decoders each and take a row of one micro-batch: nothing but the backward
itself can hide the reduction. *Total* is what the gradients that a device receives keep its busiest link for; *exposed*
is the time from the end of its last backward action to the end of its last receive of gradients, whatever happens in
between. Both are of the device where their ratio is worst, the median of the steps after the warm-up.

The cheapest cheats, and what makes them fail:
- few gradients, or a quick link: the total must be MIN_REDUCTION of the backward's price or more;
- few buckets: every route must carry MIN_BUCKETS messages;
- reducing inside the backward: no measured backward action may be longer than its price by more than MOST_LATE, none
  shorter, and all together must cost what the whole stage's backward costs;
- leaving gradients out: what a device receives must be what the ownership table says, and losses must be those of the
  same training in one process;
- a reduction that is exposed later, under another name: the step's waterfall of lost time stands in `raw`.

    .venv/bin/python benchmarks/overlap.py
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.results import print_figures, write_result
from hethub.cost.compute import gradient_bytes
from hethub.program.actions import Program, What
from hethub.specs.cluster import load_cluster
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.timeline.record import Kind

if TYPE_CHECKING:
    from bench.emulated import Run

SPEC = Path(__file__).parent / "specs" / "four-alike.yaml"
REPLICAS = 4
STEPS, WARM_UP = 6, 1
MIN_REDUCTION, MIN_BUCKETS = 0.5, 16
MOST_LATE = 0.05
BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)


def main() -> int:
    """Run, check, write the result file."""
    # Loaded here: a process that a pool starts reads this file too and has no need of it.
    from bench.emulated import Pool, measure, problems

    with closing(Pool(REPLICAS)) as pool:
        run = measure(pool, the_plan(), steps=STEPS, warm=WARM_UP)
        wrong = problems(run) + list(_unfit(run))
    ratios = [step_ratio(run, step) for step in range(WARM_UP, WARM_UP + STEPS)]
    totals = total_seconds(run)
    figures = {
        "exposed_reduction_ratio": float(np.median(ratios)),
        "reduction_over_backward": min(totals.values()) / backward_seconds(run),
        "buckets": float(min(buckets(run.program).values())),
    }
    print_figures(figures)
    print_figures({f"  {cause}": share for cause, share in run.losses_of_time.total.items()})
    for text in wrong:
        print(f"NOT VALID {text}", file=sys.stderr)
    if not wrong:
        raw = {"ratios": ratios, "run": run.as_raw()}
        print(f"wrote {write_result('overlap', figures, raw, emulated=True)}")
    return 1 if wrong else 0


def the_plan() -> Plan:
    """One stage, four replicas, one micro-batch."""
    cluster, workload = load_cluster(SPEC)
    assert workload is not None
    model = workload.model
    ranks = [
        Rank(device=device.name, heads=model.heads, ffn=model.ffn_size, vocab=model.vocab_size)
        for device in cluster.devices()
    ]
    stage = Stage(
        layers=(0, model.layers + 2), in_flight=1, replicas=[Replica(rows=1, ranks=[rank]) for rank in ranks]
    )
    pipeline = Pipeline(micro_batches=1, micro_batch_rows=REPLICAS, stages=[stage])
    return Plan(name=cluster.name, pipelines=[pipeline], cluster=cluster, workload=workload)


def backward_seconds(run: Run) -> float:
    """The price of the whole stage's backward."""
    stage = run.program.layout.pipelines[0].stages[0]
    return run.compute.group_price(stage.replicas[0].ranks, stage.layers, 1, Kind.BACKWARD).seconds


def buckets(program: Program) -> Counter[tuple[int, int]]:
    """Messages with gradients on every route (source, destination)."""
    transfers = [program.transfers[message.transfer] for message in program.messages]
    return Counter((t.source, t.destination) for t in transfers if t.what == What.REDUCE)


def total_seconds(run: Run) -> dict[int, float]:
    """For every device, how long the gradients that it receives keep their busiest capacity."""
    cells: dict[int, Counter[int]] = {device: Counter() for device in run.program.layout.used}
    for message in run.program.messages:
        transfer = run.program.transfers[message.transfer]
        if transfer.what == What.REDUCE:
            path = run.compute.graph.path(transfer.source, transfer.destination)
            cells[transfer.destination].update({c: transfer.bytes / bandwidth for c, bandwidth in path.cells})
    return {device: max(counted.values()) for device, counted in cells.items()}


def step_ratio(run: Run, step: int) -> float:
    """Exposed over total seconds in a step, of the device where it is largest."""
    records = run.timeline.records[run.timeline.records["step"] == step]
    worst = 0.0
    for device, total in total_seconds(run).items():
        own = records[records["device"] == device]
        done = own["end"][np.isin(own["kind"], BACKWARDS)].max()
        received = max(
            float(record["end"])
            for record in own[own["kind"] == Kind.RECEIVE]
            if run.program.transfer(record["message"]).what == What.REDUCE
        )
        worst = max(worst, (received - done) / total)
    return worst


def _unfit(run: Run) -> Iterator[str]:
    totals, backward = total_seconds(run), backward_seconds(run)
    if min(totals.values()) < MIN_REDUCTION * backward:
        yield f"the reduction takes {min(totals.values()):.3f} s, less than {MIN_REDUCTION} of {backward:.3f} s"
    if (fewest := min(buckets(run.program).values())) < MIN_BUCKETS:
        yield f"a route carries {fewest} buckets, fewer than {MIN_BUCKETS}"
    received: Counter[int] = Counter()
    for message in run.program.messages:
        transfer = run.program.transfers[message.transfer]
        if transfer.what == What.REDUCE:
            received[transfer.destination] += transfer.bytes
    width = gradient_bytes(run.plan.workload.precision)
    expected = {device: n * width for device, n in run.program.ownership.incoming_elements.items()}
    if dict(received) != expected:
        yield f"devices receive {dict(received)} bytes of gradients, the ownership table says {expected}"
    records = run.timeline.records
    backwards = records[np.isin(records["kind"], BACKWARDS)]
    spent = np.zeros((len(run.program.devices), WARM_UP + STEPS))
    np.add.at(spent, (backwards["device"], backwards["step"]), backwards["end"] - backwards["start"])
    late = float(np.median(spent.max(axis=0))) / backward - 1.0
    if late > MOST_LATE or spent.min() < backward - 1e-6:
        yield f"backward actions take {spent.min():.3f} to {spent.max():.3f} s, their price is {backward:.3f} s"


if __name__ == "__main__":
    sys.exit(main())
