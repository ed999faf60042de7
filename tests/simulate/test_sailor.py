from __future__ import annotations

import pytest

from hethub.cost.engines import DEEPSPEED
from hethub.errors import InputError
from hethub.simulate.sailor import SailorCosts, load_sailor_costs, sailor_peak_bytes, sailor_step_seconds
from tests.simulate.engine_runs import DEVICE, small_run

LAYER, UPDATE = 0.030, 0.004
ELEMENTS, KEPT, OUTPUT = (
    1e6,
    5e6,
    250_000,
)  # of every layer; its output is 1e6 bytes, where log2(bytes / 1e6) is 0
KINDS = ("embedding", "decoder_first", "decoder", "head")
COSTS = SailorCosts(
    times={(DEVICE, 1, 1, kind): (LAYER / 3, 2 * LAYER / 3, UPDATE) for kind in KINDS},
    links={(DEVICE, DEVICE, 1): (0.0, 0.0, 1.0)},  # 1 GB/s
    memory={(1, kind): (ELEMENTS, KEPT, OUTPUT) for kind in KINDS},
)
MESSAGE = 1e-3


@pytest.mark.parametrize(
    ("stages", "slowest", "transfers"),
    [
        (1, 26 * LAYER, 0),
        (2, 13 * LAYER + 2 * MESSAGE, 1 + 2),  # the last stage's counts twice
        (3, 9 * LAYER + 2 * MESSAGE, 1 + 2 + 2),
        (4, 7 * LAYER + 2 * MESSAGE, 2 + 2 + 2 + 2),  # of four and more the first one's too
    ],
)
def test_a_step_is_what_the_published_simulator_adds_up(stages, slowest, transfers):
    """Seeded bug: the first stage's transfer once whatever the stages; failed with 4."""
    step = sailor_step_seconds(small_run(stages, micro_batches=5), COSTS)
    assert step == pytest.approx(4 * slowest + 26 * LAYER + transfers * MESSAGE + UPDATE)


def test_gradients_are_reduced_at_one_devices_bandwidth():
    alone, three = (sailor_step_seconds(small_run(1, replicas=n), COSTS) for n in (1, 3))
    assert three - alone == pytest.approx(2 * 2 * (26 * ELEMENTS * 4 / 3) / 1e9)


def test_memory_has_24_bytes_a_parameter_and_a_constant():
    peak = sailor_peak_bytes(small_run(2), COSTS)
    assert peak == pytest.approx(13 * ELEMENTS * 24 + 2 * 13 * KEPT + 5.06e9)


def test_what_its_tables_lack_is_named():
    with pytest.raises(InputError, match="no embedding on TITAN-RTX, degree 2"):
        sailor_step_seconds(small_run(1, degree=2, engine=DEEPSPEED), COSTS)


def test_edited_rows_stand_over_measured_ones(tmp_path):
    head = (
        "device_type,tensor_parallel,micro_batch,layer_kind,forward_ms,backward_ms,optimizer_step_ms,source\n"
    )
    rows = "A,4,1,decoder,2.4,1.7,0.4,P\nA,4,1,decoder,1.5,1.7,0.4,S\n"
    (tmp_path / "layer_profiles.csv").write_text(head + rows)
    (tmp_path / "link_bandwidth.csv").write_text("scope,cluster\n")
    (tmp_path / "layer_memory.csv").write_text("tensor_parallel\n")
    times = load_sailor_costs(tmp_path).times
    assert times["A", 4, 1, "decoder"] == pytest.approx((0.0015, 0.0017, 0.0004))
