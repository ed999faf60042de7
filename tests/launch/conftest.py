from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.launch.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Six real worker processes, kept for the whole test session."""
    found = Pool(6)
    yield found
    found.close()
