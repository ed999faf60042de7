"""Write README's figures from the benchmark results, so that none is typed: python docs/figures.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PLACE = re.compile(r"(<!-- figures: begin.*?-->\n).*?(<!-- figures: end -->)", re.DOTALL)


def text() -> str:
    """The table that stands between README's marks."""
    result = json.loads((ROOT / "benchmarks" / "results" / "first_light.json").read_text())
    f = result["figures"]
    rows = [
        ("uneven split, tokens/s in modelled time", f"{f['tokens_per_second']:,.0f}"),
        ("best even split on the same devices", f"{f['even_split_tokens_per_second']:,.0f}"),
        ("uneven over even", f"{f['speedup_over_even']:.2f} x"),
        ("measured over predicted speed", f"{f['share_of_prediction']:.1%}"),
        (
            "share of the homogeneous bound (measured over predicted)",
            f"{f['share_of_homogeneous_bound']:.1%}",
        ),
        (
            "held-out loss, and a unigram model's",
            f"{f['heldout_loss']:.2f} and {f['unigram_loss']:.2f} nats per byte",
        ),
        ("real math, at most, of a device's padded time", f"{f['real_math_ratio']:.1%}"),
    ]
    lines = ["| the demo, **emulated** devices | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
    lines.append(f"Measured {result['date']} on {result['machine']}: `benchmarks/results/first_light.json`.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write README, or with --check say whether it is up to date."""
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = _PLACE.sub(lambda match: match[1] + text() + match[2], old)
    if "--check" in sys.argv:
        return 0 if new == old else 1
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
