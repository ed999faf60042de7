"""The same training: any plan gives the losses, gradient norms and weights of one process.

Seeded bugs that these tests were seen to catch (see docs/architecture.md, "What the parity tests catch"): a norm
weight's gradient summed over tensor-parallel ranks, a row dropped in a transfer, a tied table's second gradient left
out, gradients squared in place by the norm in fp64.
"""

from __future__ import annotations

from collections.abc import Collection
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hethub.cost.shapes import parameter_span
from hethub.launch.executor import local_places
from hethub.launch.reference import train_reference
from hethub.launch.worker import DTYPES, make_batches
from hethub.program import ownership
from hethub.program.actions import What
from hethub.program.ownership import own
from hethub.specs.layout import lay_out
from hethub.specs.plan import Plan
from hethub.timeline.record import Kind
from tests.launch.pool import SETTINGS, Pool, Trained
from tests.plan_strategies import NAMED_PLANS, islands, plans

STEPS = 20
TOLERANCE = {"fp64": (1e-9, 1e-9), "fp32": (1e-4, 1e-3)}  # of losses and norms, of weights
_HELD_OUT_ROWS = 10
_ISLAND_STEPS = 8  # gloo's collectives take some ten milliseconds each


def _check(plan: Plan, trained: Trained, steps: int) -> None:
    reference = train_reference(
        plan.workload,
        make_batches(trained.task),
        SETTINGS,
        steps=steps,
        seed=trained.task.seed,
        dtype=DTYPES[plan.workload.precision],
        held_out_rows=_HELD_OUT_ROWS,
    )
    close, close_weights = TOLERANCE[plan.workload.precision]
    np.testing.assert_allclose(trained.losses, reference.losses, rtol=close)
    np.testing.assert_allclose(trained.norms, reference.norms, rtol=close)
    np.testing.assert_allclose(trained.held_out, reference.held_out_loss, rtol=close)
    assert trained.weights.keys() == reference.weights.keys()
    for name, value in reference.weights.items():
        off = np.linalg.norm(trained.weights[name] - value) / np.linalg.norm(value)
        assert off < close_weights, f"{name} is off by {off:.1e}"
    _check_replicas(trained)


def _check_replicas(trained: Trained) -> None:
    """Every holder's shard is bit for bit the updaters' value: replicas cannot drift apart."""
    for device in trained.program.layout.used:
        for place in local_places(trained.program, device).values():
            for parameter in trained.program.ownership.parameters:
                if any(place.stage.layers[0] <= layer < place.stage.layers[1] for layer in parameter.layers):
                    index = [slice(None)] * len(parameter.shape)
                    index[parameter.axis] = slice(*parameter_span(parameter, place.rank.share))
                    expected = trained.weights[parameter.name][tuple(index)]
                    assert np.array_equal(trained.shards[device][parameter.name], expected)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("name", sorted(NAMED_PLANS))
def test_named_plan_trains_like_one_process(pool: Pool, name: str, precision: str) -> None:
    plan = NAMED_PLANS[name](precision)
    in_place = precision == "fp64"
    _check(plan, pool.train(plan, STEPS, held_out_rows=_HELD_OUT_ROWS, read_in_place=in_place), STEPS)


_SOME_DEVICES = st.just(frozenset()) | st.frozensets(st.integers(0, 5))


@given(plan=plans("fp64"), in_place=st.booleans(), accelerators=_SOME_DEVICES)
@settings(
    max_examples=12,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failure leaves the pool as it is: show it rather than shrink it
)
def test_random_plan_trains_like_one_process(
    pool: Pool, plan: Plan, in_place: bool, accelerators: frozenset[int]
) -> None:
    trained = pool.train(
        plan, STEPS, held_out_rows=_HELD_OUT_ROWS, read_in_place=in_place, accelerators=accelerators
    )
    _check(plan, trained, STEPS)


# -- collectives inside islands: the library's own, here gloo's -------------------------------------------------------

_ONE = dict.fromkeys(range(6), 0)
_TWO = {0: 0, 1: 0, 2: 1, 3: 1, 4: 0, 5: 1}  # so that some slices are updated in the other one
_WITH_ISLANDS = [
    ("tied embedding on the first and last stage", _ONE),
    ("parts, split backward and recomputation", _ONE),
    ("parts of everything uneven", _ONE),
    ("parts of everything uneven", _TWO),
    ("rows 5 + 2 + 1", _TWO),
    ("rows cut differently in each stage", _TWO),
    ("replicas that reduce in parts", _TWO),
    ("pipelines of different tensor-parallel degree", _TWO),
]


@pytest.mark.parametrize(("name", "where"), _WITH_ISLANDS)
def test_collectives_inside_islands_train_like_one_process(
    pool: Pool, name: str, where: dict[int, int]
) -> None:
    """Seen to catch an island's sum and a relay's weights not put into place, and a member's share left out."""
    plan = NAMED_PLANS[name]("fp64")
    trained = pool.train(plan, _ISLAND_STEPS, held_out_rows=_HELD_OUT_ROWS, islands=where)
    carried = {transfer.what for transfer in trained.program.transfers}
    assert carried >= {What.REDUCE_SCATTER, What.ALL_GATHER}
    assert (What.RELAY in carried) == (where is _TWO)
    _check(plan, trained, _ISLAND_STEPS)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("pipelines of different tensor-parallel degree", None),
        ("rows 5 + 2 + 1", None),
        ("rows 5 + 2 + 1", _TWO),
    ],
)
def test_matrices_cut_along_columns_train_like_one_process(
    pool: Pool, name: str, where: dict[int, int] | None
) -> None:
    """As large ones are that many replicas hold: no slice goes whole to one updater because it is small."""
    plan = NAMED_PLANS[name]("fp64")
    with patch.object(ownership, "MOST_INCOMING", 1), patch.object(ownership, "_SMALL", 0):
        trained = pool.train(plan, _ISLAND_STEPS, held_out_rows=_HELD_OUT_ROWS, islands=where)
    cut, plain = (sum(t.apart_elements.values()) for t in (trained.program.ownership, own(lay_out(plan))))
    assert cut > plain
    _check(plan, trained, _ISLAND_STEPS)


@given(plan=plans("fp64"), where=islands(), in_place=st.booleans(), accelerators=_SOME_DEVICES)
@settings(
    max_examples=8,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
    phases=[Phase.generate],
)
def test_random_plan_with_islands_trains_like_one_process(
    pool: Pool, plan: Plan, where: dict[int, int], in_place: bool, accelerators: frozenset[int]
) -> None:
    trained = pool.train(
        plan,
        _ISLAND_STEPS,
        held_out_rows=_HELD_OUT_ROWS,
        read_in_place=in_place,
        accelerators=accelerators,
        islands=where,
    )
    _check(plan, trained, _ISLAND_STEPS)


def test_the_same_plan_is_the_same_bits_again_and_by_messages(pool: Pool) -> None:
    plan = NAMED_PLANS["everything uneven at once"]("fp32")
    one, other, by_messages = (pool.train(plan, 5, read_in_place=where) for where in (True, True, False))
    for another in (other, by_messages):
        assert [x.hex() for x in one.losses] == [x.hex() for x in another.losses]
        assert all(np.array_equal(one.weights[name], another.weights[name]) for name in one.weights)


@pytest.mark.parametrize("accelerators", [range(6), (0, 3)], ids=["all", "two"])
def test_devices_with_queues_of_their_own_train_the_same_bits(
    pool: Pool, accelerators: Collection[int]
) -> None:
    """Seen to catch a message that leaves before its copy is there, and a receive buffer that is posted again before
    the device has read it."""
    plan = NAMED_PLANS["everything uneven at once"]("fp32")
    by_host = pool.train(plan, 5)
    queued = pool.train(plan, 5, accelerators=accelerators)
    assert [x.hex() for x in queued.losses] == [x.hex() for x in by_host.losses]
    assert queued.held_out == by_host.held_out
    assert all(np.array_equal(queued.weights[name], by_host.weights[name]) for name in by_host.weights)
    records = queued.timeline.records
    for device in accelerators:
        mine = records[(records["device"] == device) & (records["kind"] != Kind.COLLECTIVE)]
        assert (mine["start"] <= mine["end"]).all()  # and known
        assert (mine["start"][1:] >= mine["end"][:-1]).all()  # one after the other


def test_training_does_not_load_what_only_compilers_need(pool: Pool) -> None:
    """Half a second of CPU in every worker's first step, where a backward is given its gradient (see `beginning`)."""
    pool.train(NAMED_PLANS["everything uneven at once"]("fp32"), 1)
    assert not any(pool.call("imported", "sympy"))
