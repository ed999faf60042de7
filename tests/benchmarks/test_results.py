"""Result files of benchmarks."""

import json
from pathlib import Path

import pytest

from benchmarks.bench.results import write_result


def test_a_result_says_what_was_measured_where_and_on_which_commit(tmp_path: Path) -> None:
    path = write_result("some", {"share": 0.98}, [{"seconds": 1.5}], emulated=True, folder=tmp_path)
    assert path == tmp_path / "some.json"
    result = json.loads(path.read_text())
    assert result["figures"] == {"share": 0.98}
    assert result["raw"] == [{"seconds": 1.5}]
    assert result["emulated"] is True
    assert {"name", "date", "commit", "machine", "versions"} < set(result)
    assert result["versions"].keys() >= {"hethub", "torch", "ray"}


def test_a_figure_that_is_not_a_number_leaves_the_last_result_as_it_was(tmp_path: Path) -> None:
    write_result("some", {"share": 0.98}, [], emulated=True, folder=tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_result("some", {"share": float("nan")}, [], emulated=True, folder=tmp_path)
    assert json.loads((tmp_path / "some.json").read_text())["figures"] == {"share": 0.98}
