"""Write the figures of README and of the docs from the benchmark results, so that none is typed:
python docs/figures.py [--check]"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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


_ACCURACY, _SPEED = "predictor_accuracy", "predictor_speed"
PREDICTOR = (
    *(
        Row(
            _ACCURACY,
            f"{family}_time_{kind}_abs_error",
            f"{words}: step time, {what}",
            _SHARE,
            f"at most {aim}%",
        )
        for family, words, aims in (
            ("gh200", "GH200 nodes", (5, 12)),
            ("mixed", "mixed RTX cards over 1 Gbit/s", (5, 11)),
            ("turing", "Turing cards", (4, 11)),
        )
        for (kind, what), aim in zip((("mean", "mean error"), ("max", "worst")), aims, strict=True)
    ),
    Row(
        _ACCURACY,
        "undoubted_time_max_abs_error",
        "all of these but one that the data doubts (another plan's record has the same numbers): step time, worst",
        _SHARE,
        "at most 11%",
    ),
    Row(
        _ACCURACY, "gh200_memory_mean_abs_error", "GH200 nodes: peak memory, mean error", _SHARE, "at most 5%"
    ),
    Row(
        _ACCURACY,
        "turing_memory_mean_abs_error",
        "Turing cards: peak memory, mean error",
        _SHARE,
        "at most 6%",
    ),
    Row(
        _ACCURACY,
        "stage_memory_mean_abs_error",
        "Megatron-LM's stages: peak memory, mean error",
        _SHARE,
        "at most 6%",
    ),
    Row(
        _ACCURACY,
        "own_runs_mean_abs_error",
        "our own runs, random plans on CPU workers under quotas: step time, mean error",
        _SHARE,
        "at most 5%",
    ),
    Row(
        _SPEED,
        "stage_evaluations_per_second",
        "closed form, stages a second on one core",
        "{:,.0f}",
        "1,000,000",
    ),
    Row(_SPEED, "actions_per_second", "simulator, actions a second on one core", "{:,.0f}", "300,000"),
    Row(
        _SPEED,
        "devices_768_seconds",
        "a step of 768 devices and 64 micro-batches, simulated",
        "{:.2f} s",
        "2 s",
    ),
    Row(_SPEED, "devices_10000_seconds", "the same of 10,000 devices", "{:.1f} s", "20 s"),
    Row(_SPEED, "devices_10000_peak_gib", "peak memory of that, program included", "{:.2f} GiB", "2 GiB"),
)

_QUALITY, _SEARCH, _RECOVERY = "planner_quality", "planner_speed", "recovery"
PLANNER = (
    *(
        Row(
            _QUALITY,
            f"sailor_ratio_{devices}",
            f"A100 and V100 1 : 3, {devices} devices: ours over Sailor's published plan, its own cost assumptions",
            _TIMES,
            f"{aim} x",
        )
        for devices, aim in (("128", "1.35"), ("320", "1.25"), ("512", "1.10"))
    ),
    *(
        Row(
            _QUALITY,
            f"sailor_bound_{devices}",
            f"{devices} devices: what no plan of our space there can exceed (proven)",
            _TIMES,
            "",
        )
        for devices in ("128", "320", "512")
    ),
    Row(
        _QUALITY,
        "mixes_min_ratio",
        "1 : 1 mixes and five zones: ours over the better of our Sailor-like and Metis-like planners, least",
        _TIMES,
        "1.00 x",
    ),
    Row(_QUALITY, "mixes_median_ratio", "the same, median", _TIMES, "1.10 x"),
    Row(
        _QUALITY,
        "mixes_bound_median",
        "the median that no plan of our space there can exceed (proven)",
        _TIMES,
        "",
    ),
    Row(
        _QUALITY, "homogeneous_share_768", "768 devices, 140B: share of the homogeneous bound", _SHARE, "98%"
    ),
    Row(_QUALITY, "homogeneous_share_768_70b", "768 devices, 70B: the same", _SHARE, "98%"),
    Row(_QUALITY, "homogeneous_share_six_vendors", "six vendors, 13B: the same", _SHARE, "98%"),
    Row(_QUALITY, "gap_8", "proven gap, 8 devices", _SHARE, "at most 3%"),
    Row(_QUALITY, "gap_768", "proven gap, 768 devices, 140B", _SHARE, "at most 6%"),
    Row(_QUALITY, "gap_768_70b", "proven gap, 768 devices, 70B", _SHARE, "at most 6%"),
    *(
        Row(_SEARCH, f"devices_{name}_seconds", f"search, {words} devices", "{:.2f} s", aim)
        for name, words, aim in (
            ("8", "8", "0.15 s"),
            ("768", "768", "2 s"),
            ("10000", "10,000", "10 s"),
            ("100000", "100,000", ""),
        )
    ),
)
RECOVERY = (
    Row(
        _RECOVERY,
        "recovery_over_allowed",
        "slowest recovery, as a share of what is allowed (8 s for a worker, 20 s for a node)",
        "{:.2f}",
        "1",
        True,
    ),
    Row(_RECOVERY, "goodput_ratio", "goodput of 200 steps with 10 faults", _SHARE, "80%", True),
    Row(
        _RECOVERY,
        "checkpoint_stall_ratio",
        "training stands still for checkpoints",
        _SHARE,
        "at most 3.5%",
        True,
    ),
    Row(_RECOVERY, "saved_bytes_ratio", "bytes saved, over the state", "{:.3f}", "at most 1.05"),
    Row(_RECOVERY, "read_bytes_ratio", "bytes read, over what each device needs", "{:.3f}", "at most 1.1"),
    Row(_RECOVERY, "kills_survived_ratio", "kills survived", _SHARE, "100%", True),
    Row(_RECOVERY, "silent_loads", "of 1,000 damaged checkpoints, loaded without a word", "{:.0f}", "0"),
)

TELEMETRY = (
    Row(
        "telemetry_cost",
        "throughput_ratio",
        "training with telemetry, over training without",
        "{:.3f} x",
        "0.99 x",
    ),
    Row(
        "telemetry_cost",
        "scrape_seconds",
        "a scrape of a node of eight devices",
        "{:.4f} s",
        "at most 0.02 s",
    ),
    Row("telemetry_cost", "agent_mib", "memory of a node's agent", "{:.0f} MiB", "at most 60 MiB"),
    *(
        Row(
            "replan",
            f"{case}_kept_ratio",
            f"kept of the gain that `replan` promises, {words}",
            "{:.0%}",
            "80%",
            True,
        )
        for case, words in (("device", "a device at half its speed"), ("link", "a link at a quarter"))
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


def reached(wanted: Sequence[Row]) -> str:
    """A table of what has been reached, as far as it has been measured; empty where nothing has."""
    results = {name: _result(name) for name in dict.fromkeys(row.file for row in wanted)}
    rows = list(_rows(wanted, results))
    if not rows:
        return ""
    lines = ["| what | reached | aim |", "|---|---|---|", *rows, ""]
    lines += [_measured(name, result) for name, result in results.items() if result is not None]
    return "\n".join(lines) + "\n"


def _rows(wanted: Sequence[Row], results: dict[str, dict[str, Any] | None]) -> Iterator[str]:
    for row in wanted:
        result = results[row.file]
        if result is not None and row.figure in result["figures"]:
            words = row.words + (" (**emulated**)" if row.emulated else "")
            yield f"| {words} | {row.form.format(result['figures'][row.figure])} | {row.aim} |"


def by_run() -> str:
    """The error of every run of other engines, and the coefficients that were fitted to them."""
    result = _result(_ACCURACY)
    if result is None:
        return ""
    raw = result["raw"]
    lines = ["| run | predicted over measured step, less 1 |", "|---|---|"]
    lines += [
        f"| {entry['run']} | {entry['error']:+.1%} |" for entry in (*raw["runs"], *raw["megatron_time"])
    ]
    lines += ["", "| coefficient | value | 95 % interval |", "|---|---|---|"]
    for name, entry in raw["coefficients"].items():
        low, high = entry["interval_95"]
        lines.append(f"| {name} | {entry['value']:.3g} | {low:.3g} to {high:.3g} |")
    return "\n".join([*lines, "", _measured(_ACCURACY, result)]) + "\n"


def _result(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _measured(name: str, result: dict[str, Any]) -> str:
    return f"Measured {result['date']} on {result['machine']}: `benchmarks/results/{name}.json`."


PLACES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "figures": demo,
        "executor figures": partial(reached, EXECUTOR),
        "predictor figures": partial(reached, PREDICTOR),
        "planner figures": partial(reached, PLANNER),
        "recovery figures": partial(reached, RECOVERY),
        "telemetry figures": partial(reached, TELEMETRY),
    },
    "docs/cost-model.md": {"errors by run": by_run},
}


def write(file: str, text: str) -> str:
    """The text of a file with every table between its marks."""
    for name, table in PLACES[file].items():
        place = re.compile(rf"(<!-- {name}: begin.*?-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
        match = place.search(text)
        if match is None:
            raise SystemExit(f"{file}: no marks for {name}")
        text = text[: match.start()] + match[1] + table() + match[2] + text[match.end() :]
    return text


def main() -> int:
    """Write the files, or with --check say whether they are up to date."""
    old = {file: (ROOT / file).read_text() for file in PLACES}
    new = {file: write(file, text) for file, text in old.items()}
    if "--check" in sys.argv:
        return 0 if new == old else 1
    for file, text in new.items():
        (ROOT / file).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
