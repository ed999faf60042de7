from __future__ import annotations

import math

import numpy as np
import pytest

from hethub.data.batches import Batches
from hethub.data.unigram import unigram_loss
from hethub.errors import InputError


def batches(tokens, held_out=0.25):
    array = np.array(tokens, dtype=np.uint16)
    return Batches(array, sequence_length=2, global_batch=1, seed=0, held_out=held_out)


def test_a_loss_worked_out_by_hand():
    data = batches([0] * 6 + [1] * 3 + [0, 1, 3])  # 9 for training, targets 1 and 3
    assert unigram_loss(data, 1, 4) == pytest.approx(-(math.log(4 / 13) + math.log(1 / 13)) / 2)
    assert unigram_loss(data, 1) == unigram_loss(data, 1, 4)
    assert unigram_loss(data, 1, 10) == pytest.approx(-(math.log(4 / 19) + math.log(1 / 19)) / 2)


def test_only_the_asked_rows_count():
    data = batches([0] * 12 + [0, 0, 0, 1, 1], held_out=0.3)
    assert unigram_loss(data, 1) < unigram_loss(data, 2)


def test_the_loss_of_even_noise_is_that_of_a_fair_die():
    data = batches(np.random.default_rng(0).integers(0, 8, 40_000))
    assert unigram_loss(data, data.held_out_windows, 8) == pytest.approx(math.log(8), rel=1e-2)


def test_rows_and_vocabularies_that_do_not_fit_are_refused():
    data = batches([0] * 6 + [1] * 3 + [0, 1, 3])
    with pytest.raises(InputError, match="2 rows are asked for"):
        unigram_loss(data, 2)
    with pytest.raises(ValueError, match="over 0 rows"):
        unigram_loss(data, 0)
    with pytest.raises(ValueError, match="token 3 is beyond vocab_size 2"):
        unigram_loss(data, 1, 2)
