"""What our own runs' profile is made of."""

from dataclasses import replace

import pytest

from benchmarks.bench.own_profile import CELLS, Measured, Paces, profile_of, straight
from benchmarks.bench.own_runs import in_between
from hethub.cost.profiles.profile import LayerRow, Profile


def row(rows: int, seconds: float, kind: str = "decoder") -> LayerRow:
    return LayerRow(
        model="m",
        device_type="fast",
        layer_kind=kind,
        tensor_parallel=1,
        micro_batch=rows,
        sequence_length=8,
        dtype="fp32",
        forward_seconds=seconds,
        backward_seconds=2 * seconds,
        update_seconds=None,
        parameters=1,
        kept_bytes=1,
        peak_bytes=None,
        spread=0.0,
    )


def test_times_on_a_line_stay_and_one_that_is_off_comes_nearer() -> None:
    """Seeded bug: kinds of layers on one line."""
    true = [row(n, 2.0 + 3.0 * n) for n in (1, 2, 4, 8)] + [row(n, 0.1 * n, "head") for n in (1, 2, 4, 8)]
    kept = straight(Profile(tuple(true), ()))
    assert [r.forward_seconds for r in kept.layers] == pytest.approx([r.forward_seconds for r in true])
    assert [r.backward_seconds for r in kept.layers] == pytest.approx([r.backward_seconds for r in true])
    off = replace(true[2], forward_seconds=1.2 * true[2].forward_seconds)
    found = straight(Profile((*true[:2], off, *true[3:]), ())).layers[2].forward_seconds
    assert true[2].forward_seconds < found < off.forward_seconds


def test_no_part_of_a_line_is_negative() -> None:
    steep = Profile((row(1, 1.0), row(2, 4.0), row(4, 16.0)), ())
    assert all(r.forward_seconds > 0 for r in straight(steep).layers)
    falling = Profile((row(1, 2.0), row(2, 1.0)), ())
    first, second = (r.forward_seconds for r in straight(falling).layers)
    assert first == pytest.approx(second)


def test_a_cell_counts_with_the_mean_of_all_its_times() -> None:
    measured = [Measured(CELLS[0], (row(1, seconds),), (0.0, 1.0)) for seconds in (1.0, 1.0, 4.0)]
    (found,) = profile_of(measured, ()).layers
    assert found.forward_seconds == pytest.approx(2.0)


def test_a_round_measures_every_cell_once_whatever_it_begins_with() -> None:
    """Seeded bug: the last few cells are behind the last plan, and never measured."""
    for plans in (3, 15, 20):
        for turned in (0.0, 1 / 3, 2 / 3):
            parts = in_between(plans, turned)
            assert len(parts) == plans
            assert sorted(cell for part in parts for cell in part) == sorted(CELLS)


def test_the_pace_within_a_window_is_held_against_that_of_all() -> None:
    paces = Paces([(0.0, 1.0), (1.0, 1.0), (2.0, 4.0), (3.0, 2.0)])
    assert paces.within((1.5, 3.5)) == pytest.approx(1.5)
    assert paces.within((8.0, 9.0)) == 1.0
