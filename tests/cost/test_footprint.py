from __future__ import annotations

from dataclasses import replace

import pytest

from hethub.cost.engines import DEEPSPEED, MEGATRON
from hethub.cost.footprint import rank_parameters, stage_footprint
from hethub.simulate.imported_runs import opt_model
from tests.simulate.engine_runs import small_run

MIB = 2**20
# Counted by torch in Megatron-DeepSpeed's OPT-350M: elements of embedding, decoder and head on one rank.
ELEMENTS = {
    1: (53608448, 12596224, 51513344),
    2: (27918336, 6301184, 25823232),
    4: (15073280, 3153664, 12978176),
    8: (8650752, 1579904, 6555648),
}
# Bytes that torch keeps of a decoder after its forward, one row.
KEPT = {1: 360726528, 2: 192954368, 4: 109068288, 8: 67125248}


@pytest.mark.parametrize("degree", ELEMENTS)
def test_parameters_of_a_gpt_layer_are_those_that_torch_counts(degree):
    model = opt_model(degree)
    found = tuple(rank_parameters(model, layer, degree) for layer in (0, 1, 25))
    assert found == ELEMENTS[degree]


@pytest.mark.parametrize("degree", KEPT)
def test_a_decoder_keeps_what_torch_was_seen_to_keep(degree):
    run = small_run(1, micro_batches=1, degree=degree)
    more = replace(run, stages=(replace(run.stages[0], halves=(25, 25)),))
    decoder = stage_footprint(more, 0).activation_bytes - stage_footprint(run, 0).activation_bytes
    assert decoder == pytest.approx(KEPT[degree], rel=0.01)


def test_earlier_stages_hold_more_micro_batches():
    run = small_run(4, micro_batches=8)
    few = replace(run, micro_batches=1)
    for stage, times in enumerate((4, 3, 2, 1)):
        one = stage_footprint(few, stage).activation_bytes
        assert stage_footprint(run, stage).activation_bytes == pytest.approx(times * one)


def test_dropout_keeps_masks_and_a_dropped_copy_of_the_scores():
    run = small_run(1)
    assert (
        stage_footprint(replace(run, engine=MEGATRON), 0).activation_bytes
        > 1.7 * stage_footprint(replace(run, engine=DEEPSPEED), 0).activation_bytes
    )
