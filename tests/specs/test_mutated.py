"""Files that are nearly right: whatever is wrong is told in one line a problem, and nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.launch.small_job import listing
from tests.specs.mutated import READERS, refused_or_read, write_good_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    write_good_files(place)
    return place


@settings(max_examples=200)
@given(seed=st.integers(0, 10**9))
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_is_nearly_right_is_read_or_refused(folder: Path, name: str, seed: int) -> None:
    """Rows 16 and 17 of the matrix of faults; `make chaos` has 100,000."""
    before = set(listing(folder))
    refused_or_read(folder, name, seed)
    assert set(listing(folder)) - before <= {f"changed-{name}"}  # nothing executed, nothing written
