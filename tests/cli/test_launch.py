"""`hethub launch` before its first worker: what it asks of the machine, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.launch.small_job import edit, hethub, listing, write_job


def test_help_shows_an_example(capsys, tmp_path):
    assert "hethub launch cluster_specs/laptop-job.yaml" in " ".join(
        hethub(capsys, tmp_path, "launch", "--help").out.split()
    )


@pytest.mark.parametrize("package", ["ray", "prometheus_client"])
def test_missing_packages_are_named_with_the_way_to_get_them(capsys, tmp_path, monkeypatch, package):
    """Seeded bug: the one that serves metrics is missed only when the run folder has been emptied."""
    write_job(tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr(
        "hethub.cli.launch.find_spec", lambda name: None if name == package else find_spec(name)
    )
    result = hethub(capsys, tmp_path, "launch", "job.yaml")
    assert result.exit_code == 4
    assert result.err == f"hethub: not installed: {package}. Run: pip install 'hethub[launch,plots]'\n"
    assert listing(tmp_path) == before


def test_bad_input_is_told_before_a_heavy_package_is_loaded(tmp_path):
    write_job(tmp_path)
    edit(tmp_path / "cluster.yaml", ("memory_mib: 0.25", "memory_mib: 0.12"))
    code = """
import sys
from hethub.cli.main import run
sys.argv = ["hethub", "launch", "job.yaml"]
try:
    run()
finally:
    print([name for name in ("torch", "ray", "plotly", "scipy") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "[]\n")


def test_without_metrics_their_package_is_not_asked_for(capsys, tmp_path, monkeypatch):
    write_job(tmp_path)
    edit(tmp_path / "job.yaml", ("output: run", "output: run\ntelemetry: {enabled: false}"))
    monkeypatch.setattr("hethub.cli.launch.find_spec", lambda name: None)
    result = hethub(capsys, tmp_path, "launch", "job.yaml")
    assert result.exit_code == 4 and "torch, ray" in result.err and "prometheus" not in result.err
