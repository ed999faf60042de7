"""Seconds between stages: what a schedule believes is what the simulator does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from hethub.program.compile import compile_program
from hethub.program.fold import fold
from hethub.program.hops import hop_seconds
from hethub.simulate.engine import simulate
from hethub.specs.layout import lay_out
from hethub.specs.plan import Pipeline, Plan, Rank, Replica, Stage
from hethub.specs.workload import Workload
from hethub.timeline.record import Kind
from tests.plan_strategies import compute_model, tiny_model
from tests.program.test_fold import folding_cluster

LATENCY, BYTES_PER_SECOND = 1e-5, 4e7  # of the link between the cluster's nodes
ROWS, TOKENS = 2, 16


def plan(counts: Sequence[int], degree: int = 1, *, emulated: bool = False) -> Plan:
    """Pipelines of two stages with so many micro-batches each, the first stages on one node, the others on the next."""
    model = tiny_model(layers=2, heads=4)
    cluster = replace(folding_cluster(4), emulated_time_scale=1.0 if emulated else None)
    share = {"heads": 4 // degree, "ffn": model.ffn_size // degree, "vocab": model.vocab_size // degree}

    def stage(pipeline: int, number: int) -> Stage:
        devices = [f"g/{number}/{degree * pipeline + member}" for member in range(degree)]
        ranks = [Rank(device=device, **share) for device in devices]
        layers = ((0, 2), (2, 4))[number]
        return Stage(layers=layers, in_flight=2 - number, replicas=[Replica(rows=ROWS, ranks=ranks)])

    batch = ROWS * sum(counts)
    workload = Workload(
        model=model, sequence_length=TOKENS, global_batch=batch, precision="fp32", optimizer="adamw"
    )
    pipelines = [
        Pipeline(
            schedule="1f1b",
            micro_batches=count,
            micro_batch_rows=ROWS,
            stages=[stage(number, 0), stage(number, 1)],
        )
        for number, count in enumerate(counts)
    ]
    return Plan(name="hops", cluster=cluster, workload=workload, pipelines=pipelines)


def size_bytes(of: Plan) -> int:
    """Of a micro-batch between the stages."""
    return ROWS * TOKENS * of.workload.model.hidden_size * 4


@pytest.mark.parametrize(
    ("counts", "degree", "emulated", "messages"),
    [
        ((2,), 1, False, (1.0,)),
        ((2,), 2, False, (1.0,)),  # each rank sends its half over the one link
        ((2, 2), 1, False, (2.0, 2.0)),  # shared fairly, both end together
        ((2, 2), 1, True, (1.5, 1.5)),  # one after the other
        (
            (6, 2),
            1,
            False,
            (1 + 1 / 3, 4.0),
        ),  # every third micro-batch meets one of the other's; each meets three
    ],
)
def test_messages_of_all_ranks_and_of_other_pipelines_share_a_nodes_link(
    counts: Sequence[int], degree: int, emulated: bool, messages: Sequence[float]
) -> None:
    """Seen to catch: the first rank's message alone, which was all that schedules knew; pipelines that meet in every
    micro-batch, however few the other has."""
    given = plan(counts, degree, emulated=emulated)
    wanted = [(LATENCY + n * size_bytes(given) / BYTES_PER_SECOND,) for n in messages]
    assert hop_seconds(lay_out(given), compute_model(given)) == [pytest.approx(hop) for hop in wanted]


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize(("pipelines", "degree"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_simulator_takes_as_long(pipelines: int, degree: int, emulated: bool) -> None:
    """On average of alike pipelines, of the first micro-batch."""
    given = plan([2] * pipelines, degree, emulated=emulated)
    layout, compute = lay_out(given), compute_model(given)
    timeline = simulate(compile_program(layout, compute), compute).timeline
    assert timeline is not None
    records = timeline.records[timeline.records["kind"] == Kind.FORWARD]
    records = records[records["micro_batch"] == 0]
    gaps = []
    for pipeline in layout.pipelines:
        first, second = (list(stage.devices()) for stage in pipeline.stages)
        sent = records["end"][records["device"] == first[0]].max()
        begun = [records["start"][records["device"] == device].min() for device in second]
        gaps.append(max(begun) - sent)  # when the last rank has its part
    assert np.mean(gaps) == pytest.approx(hop_seconds(layout, compute)[0][0], rel=1e-6)


def test_groups_folded_into_one_device_take_as_long() -> None:
    given = plan((2, 2), 2)
    layout, compute = lay_out(given), compute_model(given)
    folded = fold(layout, compute)
    assert folded is not None
    for one, other in zip(
        hop_seconds(layout, compute), hop_seconds(folded.layout, folded.compute), strict=True
    ):
        assert one == pytest.approx(other)
