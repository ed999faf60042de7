"""Seconds between stages: what a schedule believes is what the simulator does."""

from __future__ import annotations

from dataclasses import replace

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


def plan(pipelines: int, degree: int = 1, *, emulated: bool = False) -> Plan:
    """Alike pipelines of two stages, the first stages on one node and the others on the next."""
    model = tiny_model(layers=2, heads=4)
    cluster = replace(folding_cluster(4), emulated_time_scale=1.0 if emulated else None)
    heads = model.kv_heads // degree

    def stage(number: int) -> Stage:
        ranks = [
            Rank(
                devices=",".join(f"g/{number}/{degree * p + member}" for p in range(pipelines)),
                count=1,
                heads=heads,
                ffn=model.ffn_size // degree,
                vocab=model.vocab_size // degree,
            )
            for member in range(degree)
        ]
        layers = ((0, 2), (2, 4))[number]
        return Stage(layers=layers, in_flight=2 - number, replicas=[Replica(rows=ROWS, ranks=ranks)])

    workload = Workload(
        model=model,
        sequence_length=TOKENS,
        global_batch=2 * ROWS * pipelines,
        precision="fp32",
        optimizer="adamw",
    )
    return Plan(
        name="hops",
        cluster=cluster,
        workload=workload,
        pipelines=[
            Pipeline(
                repeat=pipelines,
                schedule="1f1b",
                micro_batches=2,
                micro_batch_rows=ROWS,
                stages=[stage(0), stage(1)],
            )
        ],
    )


def size_bytes(of: Plan) -> int:
    """Of a micro-batch between the stages."""
    return ROWS * TOKENS * of.workload.model.hidden_size * 4


@pytest.mark.parametrize(
    ("pipelines", "degree", "emulated", "messages"),
    [
        (1, 1, False, 1.0),
        (1, 2, False, 1.0),  # each rank sends its half over the one link
        (2, 1, False, 2.0),  # shared fairly, both end together
        (2, 1, True, 1.5),  # one after the other
        (4, 1, True, 2.5),
    ],
)
def test_messages_of_all_ranks_and_of_alike_pipelines_share_a_nodes_link(
    pipelines: int, degree: int, emulated: bool, messages: float
) -> None:
    """Seen to catch: the first rank's message alone, which was all that schedules knew."""
    given = plan(pipelines, degree, emulated=emulated)
    wanted = LATENCY + messages * size_bytes(given) / BYTES_PER_SECOND
    for hops in hop_seconds(lay_out(given), compute_model(given)):
        assert hops == pytest.approx((wanted,))


@pytest.mark.parametrize(("pipelines", "degree"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_simulator_takes_as_long_over_links_that_are_shared_fairly(pipelines: int, degree: int) -> None:
    given = plan(pipelines, degree)
    layout, compute = lay_out(given), compute_model(given)
    timeline = simulate(compile_program(layout, compute), compute).timeline
    assert timeline is not None
    records = timeline.records[timeline.records["kind"] == Kind.FORWARD]
    records = records[records["micro_batch"] == 0]
    first, second = (next(iter(stage.devices())) for stage in layout.pipelines[0].stages)
    sent = records["end"][records["device"] == first].max()
    begun = records["start"][records["device"] == second].min()
    assert begun - sent == pytest.approx(hop_seconds(layout, compute)[0][0], rel=1e-6)


def test_groups_folded_into_one_device_take_as_long() -> None:
    given = plan(2, 2)
    layout, compute = lay_out(given), compute_model(given)
    folded = fold(layout, compute)
    assert folded is not None
    for one, other in zip(
        hop_seconds(layout, compute), hop_seconds(folded.layout, folded.compute), strict=True
    ):
        assert one == pytest.approx(other)
