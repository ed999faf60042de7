from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.telemetry.prometheus import ScrapedRun, quick_rules, scraped


@pytest.fixture(scope="session")
def scraped_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScrapedRun]:
    """An emulated run of three device types with a real Prometheus that scrapes it."""
    folder = tmp_path_factory.mktemp("scraped")
    with scraped(folder, rules=quick_rules(folder / "rules")) as found:
        yield found
