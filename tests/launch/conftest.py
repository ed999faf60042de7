from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.launch.pool import Pool

# Workers have a thread each; the reference in this process too, since threads that spin for each other beside them
# make both crawl.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Six real worker processes, kept for the whole test session."""
    found = Pool(6)
    yield found
    found.close()
