"""Initial weights are a function of (seed, name) alone: any slice of any plan is a slice of the same whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hethub.cost.shapes import Parameter, model_parameters
from hethub.launch.weights import initial_weight
from hethub.specs.workload import Model
from tests.plan_strategies import models, tiny_model


def whole(parameter: Parameter, model: Model, seed: int = 1) -> np.ndarray:
    return initial_weight(parameter, (0, parameter.shape[parameter.axis]), model, seed)


@given(data=st.data(), model=models())
def test_a_slice_is_that_slice_of_the_whole(data, model):
    parameter = data.draw(st.sampled_from(model_parameters(model)))
    size = parameter.shape[parameter.axis]
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    expected = np.take(whole(parameter, model), range(start, stop), axis=parameter.axis)
    assert np.array_equal(initial_weight(parameter, (start, stop), model, 1), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_slice_over_several_blocks_is_that_slice_of_the_whole(axis):
    model = tiny_model()
    parameter = Parameter("lm_head.weight", (200, 200), "vocab", axis, 1, (4,))
    expected = np.take(whole(parameter, model), range(50, 150), axis=axis)
    assert np.array_equal(initial_weight(parameter, (50, 150), model, 1), expected)


def test_norm_weights_are_ones_and_the_rest_is_normal():
    model = tiny_model(layers=4)
    for parameter in model_parameters(model):
        values = whole(parameter, model)
        if len(parameter.shape) == 1:
            assert (values == 1).all()
        else:
            residual = parameter.name.endswith(("o_proj.weight", "down_proj.weight"))
            assert values.std() == pytest.approx(0.02 / 8**0.5 if residual else 0.02, rel=0.2)
            assert abs(values.mean()) < 0.005


def test_names_and_seeds_give_unlike_weights():
    model = tiny_model()
    one, other = [p for p in model_parameters(model) if p.name.endswith("q_proj.weight")][:2]
    assert not np.array_equal(whole(one, model), whole(other, model))
    assert not np.array_equal(whole(one, model), whole(one, model, seed=2))


def test_the_values_of_a_seed_stay_the_same():
    """Losses that were written down hold only as long as they start from these; numpy does not promise it."""
    parameter = Parameter("lm_head.weight", (2, 2), "vocab", 0, 1, (4,))
    values = initial_weight(parameter, (0, 2), tiny_model(), 1)
    assert [[f"{x:.9f}" for x in row] for row in values] == [
        ["-0.002735590", "-0.020462080"],
        ["-0.010795516", "0.033199235"],
    ]
