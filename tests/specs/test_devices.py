"""Device ranges: inclusive, node-major, and read back as written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hethub.specs.devices import format_devices, parse_devices

NAMES = st.builds(
    "{}/{}/{}".format, st.sampled_from(["a", "b-1", "c.x"]), st.integers(0, 5), st.integers(0, 5)
)


def test_ranges_are_inclusive_and_node_major():
    assert parse_devices("g/0-1/2-3, h/4/0") == ["g/0/2", "g/0/3", "g/1/2", "g/1/3", "h/4/0"]


def test_whole_nodes_become_one_range():
    names = parse_devices("g/0-3/0-7, g/4/0-4")
    assert format_devices(names) == "g/0-3/0-7, g/4/0-4"


@given(st.lists(NAMES, min_size=1, max_size=40))
def test_any_list_of_names_reads_back(names):
    assert parse_devices(format_devices(names)) == names


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is not group/node/device"),
        ("g/0", "'g/0' is not"),
        ("g/0/1,", "'' is not"),
        ("../0/1", "is not"),
        ("g/3-1/0", "the range 3-1 runs backwards"),
        ("g/0-9999999/0-7", "more than 1000000 devices"),
        ("g/-1/0", "is not"),
        ("g/٣/0", "is not"),
    ],
)
def test_bad_text_is_refused_with_the_entry(text, why):
    with pytest.raises(ValueError) as caught:
        parse_devices(text)
    assert why in str(caught.value)
