"""Result files: what a benchmark found, on which machine, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path

__all__ = ["RESULTS", "ROOT", "print_figures", "write_result"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("hethub", "torch", "ray", "numpy")


def print_figures(figures: Mapping[str, float], problems: Collection[str] = ()) -> None:
    """A line for each figure; those named in `problems` are marked as not valid."""
    for name, value in figures.items():
        print(f"{name:32} {value:.6g}{'   NOT VALID' if name in problems else ''}")


def write_result(
    name: str, figures: Mapping[str, float], raw: object, *, emulated: bool, folder: Path = RESULTS
) -> Path:
    """Write `folder`/NAME.json whole or not at all and return its path.

    `figures` are the few numbers that a document quotes; `raw` (anything JSON can hold) the repetitions behind them.
    `emulated` says whether the devices' time was modelled.
    """
    result = {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {package: version(package) for package in _PACKAGES},
        "emulated": emulated,
        "figures": dict(figures),
        "raw": raw,
    }
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    # NaN is no JSON; a figure that is not a number is a bug of the benchmark and must not be committed.
    temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
    return path


def _commit() -> str:
    """The commit that was measured, marked where the checkout differs from it; empty outside a checkout."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"{head} with changes" if head and changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
