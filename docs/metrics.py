"""Write the table of metrics in docs/telemetry.md from the code: python docs/metrics.py [--check]"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from hethub.telemetry.metrics import ACTIVITY_OF_KIND, METRICS, SCOPE_LABELS, Metric, Scope

PAGE = Path(__file__).parent / "telemetry.md"
_MARK = "<!-- {}: {} (written by docs/metrics.py from hethub/telemetry/metrics.py) -->"
_WORDS = {
    Scope.DEVICE: "Of a device, by its node's agent",
    Scope.LINK: "Of a kind of link into a node, by its agent",
    Scope.NODE: "Of a node, by its agent",
    Scope.STAGE: "Of the devices of one type in a stage, by the driver",
    Scope.RUN: "Of a run, by the driver",
    Scope.PROCESS: "Of every target",
}


def _labels(labels: tuple[str, ...]) -> str:
    return ", ".join(f"`{label}`" for label in labels) or "none"


def _row(entry: Metric) -> str:
    values = "; ".join(f"`{label}`: {', '.join(known)}" for label, known in entry.values.items())
    words = entry.help + (f" {values}." if values else "")
    mark = " *" if entry.optional else ""
    return (
        f"| `{entry.name}`{mark} | {entry.kind} | {_labels(entry.labels) if entry.labels else ''} | {words} |"
    )


def metrics_table() -> str:
    """A table of every scope's metrics."""
    parts = []
    for scope in Scope:
        entries = [entry for entry in METRICS.values() if entry.scope == scope]
        parts += [
            f"### {_WORDS[scope]}",
            "",
            f"Labels: {_labels(SCOPE_LABELS[scope])}.",
            "",
            "| metric | kind | more labels | meaning |",
            "|---|---|---|---|",
            *map(_row, entries),
            "",
        ]
    return "\n".join(parts)


def activities_table() -> str:
    """Activities of `hethub_device_seconds_total` with their kinds."""
    kinds: dict[str, list[str]] = {}
    for kind, activity in ACTIVITY_OF_KIND.items():
        kinds.setdefault(activity, []).append(kind)
    rows = [f"| {activity} | {', '.join(found)} |" for activity, found in kinds.items()]
    return "\n".join(("| activity | kinds |", "|---|---|", *rows, ""))


def written(text: str) -> str:
    """The page with both tables as the code has them. Raises ValueError where it lacks their marks."""
    for name, table in (("activities", activities_table()), ("metrics", metrics_table())):
        begin, end = _MARK.format(name, "begin"), f"<!-- {name}: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{PAGE}: has no marks of the table {name}")
        content = f"{begin}\n{table}{end}"
        text = pattern.sub(lambda match, content=content: content, text)  # type: ignore[misc]
    return text


def main() -> int:
    """Write the page, or with --check say whether it is current."""
    text = PAGE.read_text(encoding="utf-8")
    now = written(text)
    if "--check" in sys.argv:
        if now != text:
            sys.stderr.write(f"{PAGE}: is not what the code says. Run `python docs/metrics.py`.\n")
        return int(now != text)
    PAGE.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
