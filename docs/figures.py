"""Write README's figures from the benchmark results, so that none is typed: python docs/figures.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


class Row(NamedTuple):
    """A figure of a result file, in words; `aim` is what it should reach, `emulated` whether its time is modelled."""

    file: str
    figure: str
    words: str
    form: str
    aim: str
    emulated: bool = False


_SHARE, _TIMES = "{:.1%}", "{:.2f} x"
EXECUTOR = (
    Row(
        "heterogeneous_efficiency",
        "homogeneous_share_emulated",
        "eight devices of three types in one job, over the sum of each type's own job",
        _SHARE,
        "98%",
        True,
    ),
    Row(
        "heterogeneous_efficiency",
        "physical_share_emulated",
        "the same, over the physical bound",
        _SHARE,
        "93%",
        True,
    ),
    Row(
        "heterogeneous_efficiency",
        "homogeneous_share_slow_link",
        "the same over slow links, over the sum of each type's own job",
        _SHARE,
        "95%",
        True,
    ),
    Row(
        "heterogeneous_efficiency",
        "homogeneous_share_cpu_quota",
        "four CPU workers of unequal quotas, over the sum of each type's own job",
        _SHARE,
        "95%",
    ),
    Row(
        "against_torch",
        "speedup_over_ddp",
        "such workers: our plan over DistributedDataParallel",
        _TIMES,
        "2.30 x",
    ),
    Row(
        "against_torch",
        "speedup_over_even_pipeline",
        "such workers: our plan over an even 1F1B of torch.distributed.pipelining",
        _TIMES,
        "2.30 x",
    ),
    Row(
        "against_torch",
        "pipeline_ratio",
        "equal CPU workers: 1F1B over torch.distributed.pipelining's",
        _TIMES,
        "0.98 x",
    ),
    Row(
        "against_torch",
        "data_parallel_ratio",
        "equal CPU workers: replicas over DistributedDataParallel",
        _TIMES,
        "0.98 x",
    ),
    Row(
        "against_torch",
        "zero1_ratio",
        "equal CPU workers: updaters over ZeroRedundancyOptimizer",
        _TIMES,
        "0.98 x",
    ),
    Row(
        "against_torch",
        "tensor_parallel_ratio",
        "equal CPU workers: tensor parallelism over torch.distributed.tensor.parallel",
        _TIMES,
        "0.98 x",
    ),
    Row(
        "overlap",
        "exposed_reduction_ratio",
        "share of the gradient reduction that the backward does not hide",
        _SHARE,
        "at most 10%",
        True,
    ),
    Row(
        "start",
        "start_seconds",
        "from the command's start to the end of its first step, eight workers",
        "{:.1f} s",
        "at most 15 s",
        True,
    ),
)


def demo() -> str:
    """The table of the demo."""
    result = _result("first_light")
    assert result is not None
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
    lines = ["| the demo, **emulated** devices | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join([*lines, "", _measured("first_light", result)]) + "\n"


def executor() -> str:
    """The table of what the executor reaches, as far as it has been measured; empty where nothing has."""
    results = {name: _result(name) for name in dict.fromkeys(row.file for row in EXECUTOR)}
    rows = list(_rows(results))
    if not rows:
        return ""
    lines = ["| what | reached | aim |", "|---|---|---|", *rows, ""]
    lines += [_measured(name, result) for name, result in results.items() if result is not None]
    return "\n".join(lines) + "\n"


def _rows(results: dict[str, dict[str, Any] | None]) -> Iterator[str]:
    for row in EXECUTOR:
        result = results[row.file]
        if result is not None and row.figure in result["figures"]:
            words = row.words + (" (**emulated**)" if row.emulated else "")
            yield f"| {words} | {row.form.format(result['figures'][row.figure])} | {row.aim} |"


def _result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _measured(name: str, result: dict[str, Any]) -> str:
    return f"Measured {result['date']} on {result['machine']}: `benchmarks/results/{name}.json`."


PLACES = {"figures": demo, "executor figures": executor}


def write(readme: str) -> str:
    """The text of README with every table between its marks."""
    for name, table in PLACES.items():
        place = re.compile(rf"(<!-- {name}: begin.*?-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        match = place.search(readme)
        if match is None:
            raise SystemExit(f"README.md: no marks for {name}")
        readme = readme[: match.start()] + match[1] + table() + match[2] + readme[match.end() :]
    return readme


def main() -> int:
    """Write README, or with --check say whether it is up to date."""
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = write(old)
    if "--check" in sys.argv:
        return 0 if new == old else 1
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
