"""The demo as a benchmark: uneven against the best even split on eight emulated devices, and against the prediction.

The cheapest cheats, and the lines that make them fail: an emulated device that ends its actions early would beat its
prediction (`share_of_prediction` above MOST_OF_PREDICTION fails); one whose math does not fit its time would overrun
(`overrun_ratio`, `real_math_ratio`); a split that skips work would train differently (`even_losses_differ`); time that
belongs to no action would hide in the gaps (`unaccounted_ratio`).

    .venv/bin/python benchmarks/first_light.py            # runs cluster_specs/laptop-job.yaml, about five minutes
    .venv/bin/python benchmarks/first_light.py --run DIR  # takes a finished run of that job
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from bench.results import ROOT, print_figures, write_result

MOST_OF_PREDICTION = 1.05
KEPT = (
    "loss_first",
    "loss_last",
    "heldout_loss",
    "unigram_loss",
    "tokens_per_second",
    "predicted_tokens_per_second",
    "even_split_tokens_per_second",
    "wall_tokens_per_second",
    "share_of_prediction",
    "share_of_homogeneous_bound",
    "share_of_physical_bound",
    "even_losses_differ",
    "time_scale",
    "overrun_ratio",
    "unaccounted_ratio",
    "real_math_ratio",
    "start_seconds",
)


def main() -> int:
    """Run, check against the cheats, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run folder of cluster_specs/laptop-job.yaml")
    folder = parser.parse_args().run
    if folder is None:
        subprocess.run(
            [sys.executable, "-m", "hethub", "launch", "cluster_specs/laptop-job.yaml"], cwd=ROOT, check=True
        )
        folder = ROOT / "runs" / "demo"
    summary = json.loads((folder / "summary.json").read_text())
    figures = {key: summary[key] for key in KEPT}
    figures["speedup_over_even"] = summary["tokens_per_second"] / summary["even_split_tokens_per_second"]
    problems = [
        name
        for name, fine in {
            "share_of_prediction": summary["share_of_prediction"] <= MOST_OF_PREDICTION,
            "overrun_ratio": summary["overrun_ratio"] <= 0.01,
            "real_math_ratio": summary["real_math_ratio"] <= 0.05,
            "even_losses_differ": summary["even_losses_differ"] <= 1e-4,
            "unaccounted_ratio": summary["unaccounted_ratio"] <= 0.01,
        }.items()
        if not fine
    ]
    print_figures(figures, problems)
    if problems:
        return 1
    write_result("first_light", figures, summary["devices"], emulated=summary["emulated"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
