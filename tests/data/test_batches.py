from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hethub.data.batches import Batches
from hethub.errors import InputError

ORDER_OF_EPOCH_0 = [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
ORDER_OF_EPOCH_1 = [0, 6, 5, 3, 4, 9, 7, 8, 2, 1]


@st.composite
def batches(draw):
    """Batches over tokens that are their own positions, so that a row shows where it was cut."""
    sequence_length = draw(st.integers(1, 5))
    tokens = draw(st.integers(10 * sequence_length + 10, 200))
    return Batches(
        np.arange(tokens, dtype=np.uint16),
        sequence_length=sequence_length,
        global_batch=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**64 - 1)),
        held_out=draw(st.sampled_from([0.2, 0.3, 0.5])),
    )


def make(tokens=100, **changes):
    arguments = {"sequence_length": 4, "global_batch": 5, "seed": 1, "held_out": 0.2} | changes
    return Batches(np.arange(tokens, dtype=np.uint16), **arguments)


@given(batches(), st.data())
def test_rows_cut_anywhere_are_the_whole_batch(data, draw):
    """However a plan divides the batch, its parts are it: a row dropped or doubled at a cut fails this.

    (Tried: `np.arange(start, stop - 1)` and `np.arange(start + (start > 0), stop)` in `sample_ids`.)
    """
    step = draw.draw(st.integers(0, 50))
    cuts = sorted(draw.draw(st.lists(st.integers(0, data.global_batch), max_size=4)))
    edges = [0, *cuts, data.global_batch]
    parts = [data.rows(step, a, b) for a, b in pairwise(edges)]
    whole = data.rows(step, 0, data.global_batch)
    for k in (0, 1):
        assert whole[k].shape == (data.global_batch, data.sequence_length)
        assert whole[k].dtype == np.int64
        assert np.array_equal(np.concatenate([part[k] for part in parts]), whole[k])


@given(batches(), st.integers(0, 3))
def test_every_epoch_visits_every_window_once(data, epoch):
    """A row dropped from a batch, or an order that is no permutation, leaves a window out."""
    windows, batch = data.train_windows, data.global_batch
    first, last = epoch * windows, (epoch + 1) * windows
    steps = range(first // batch, -(-last // batch))
    ids = np.concatenate([data.sample_ids(step, 0, batch) for step in steps])
    offset = first - steps.start * batch
    assert sorted(ids[offset : offset + windows]) == list(range(windows))


@given(batches())
def test_targets_are_the_next_tokens_of_the_training_part(data):
    ids = data.sample_ids(3, 0, data.global_batch)
    inputs, targets = data.rows(3, 0, data.global_batch)
    assert np.array_equal(inputs[:, 0], ids * data.sequence_length)
    assert np.array_equal(inputs, inputs[:, :1] + np.arange(data.sequence_length))
    assert np.array_equal(targets, inputs + 1)


@given(batches())
def test_held_out_tokens_are_never_trained_on(data):
    steps = range(-(-data.train_windows // data.global_batch))
    trained = {int(t) for s in steps for part in data.rows(s, 0, data.global_batch) for t in part.flat}
    inputs, targets = data.held_out_rows(0, data.held_out_windows)
    held_out = set(inputs.flat) | set(targets.flat)
    assert not trained & held_out
    assert data.train_tokens == min(held_out), "the tail begins where training ends"


def test_held_out_rows_come_in_order():
    inputs, targets = make().held_out_rows(1, 3)
    assert inputs.tolist() == [[84, 85, 86, 87], [88, 89, 90, 91]]
    assert np.array_equal(targets, inputs + 1)


def test_the_order_depends_on_seed_and_epoch_alone():
    """The numbers themselves: a run must see the same data after an upgrade of numpy."""
    corpus = {"tokens": 41, "held_out": 0.0}
    data = make(**corpus, global_batch=10)
    assert data.sample_ids(0, 0, 10).tolist() == ORDER_OF_EPOCH_0
    assert data.sample_ids(1, 0, 10).tolist() == ORDER_OF_EPOCH_1
    assert make(**corpus, global_batch=10, seed=2).sample_ids(0, 0, 10).tolist() != ORDER_OF_EPOCH_0
    halves = make(**corpus, global_batch=5)
    assert [*halves.sample_ids(2, 0, 5), *halves.sample_ids(3, 0, 5)] == ORDER_OF_EPOCH_1


def test_a_batch_may_be_larger_than_an_epoch():
    data = make(tokens=13, held_out=0.0, global_batch=9)
    ids = data.sample_ids(0, 0, 9)
    assert [sorted(ids[i : i + 3]) for i in (0, 3, 6)] == [[0, 1, 2]] * 3


def test_no_rows_have_the_shape_of_rows():
    assert make().rows(0, 2, 2)[0].shape == (0, 4)


def test_without_a_held_out_part_all_is_trained_on():
    data = make(held_out=0.0)
    assert (data.train_tokens, data.held_out_tokens, data.held_out_windows) == (100, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "held_out", "said"),
    [
        (0, 0.0, "training part has 0 tokens"),
        (4, 0.0, "training part has 4 tokens of the corpus's 4 .* of 4 needs 5"),
        (40, 0.1, "held-out part has 4 tokens of the corpus's 40 .* of 4 needs 5"),
    ],
)
def test_too_short_a_corpus_is_refused_with_both_lengths(tokens, held_out, said):
    with pytest.raises(InputError, match=said):
        make(tokens=tokens, held_out=held_out)


def test_more_held_out_rows_than_there_are_are_refused():
    with pytest.raises(InputError, match="5 rows are asked for, the held-out part has 4"):
        make().held_out_rows(0, 5)


@pytest.mark.parametrize("asked", [(-1, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, 6)])
def test_rows_outside_the_batch_are_refused(asked):
    with pytest.raises(ValueError, match="are not in a batch of 5"):
        make().rows(*asked)
