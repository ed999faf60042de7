from __future__ import annotations

import pytest

from tests.chaos.three_types import JOB, Ran, check_invariants, launch, write_job


@pytest.fixture(scope="package")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The run that nothing happens to."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_job(folder)
    ran = launch(folder)
    check_invariants(ran, ran, JOB["steps"])
    return ran
