"""Tables with units: the strict reader and the writer of the profile format.

A file starts with a line that names its table and version, `# hethub profile layers 1`, and a header in which every
measured column carries its unit in brackets: `forward [ms]`, `message [MiB]`. Values are kept in seconds and bytes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hethub.errors import InputError
from hethub.files import whole_file

__all__ = ["UNITS", "VERSION", "Column", "Row", "read_table", "write_table"]

VERSION = 1
UNITS: Mapping[str, Mapping[str, float]] = {
    "time": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "size": {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "kB": 1e3, "MB": 1e6, "GB": 1e9},
}
_WRITTEN = {"time": "ms", "size": "B"}
_MOST_PROBLEMS = 20

Row = dict[str, str | int | float | None]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: text, a count (a whole number above 0), a time, a size or a ratio; `key` columns tell rows apart."""

    name: str
    kind: Literal["text", "count", "time", "size", "ratio"]
    key: bool = False
    optional: bool = False

    @property
    def field(self) -> str:
        """Its name with the unit that values are kept in."""
        return self.name + {"time": "_seconds", "size": "_bytes"}.get(self.kind, "")


class _Reader:
    """Collects the problems of one file, each with its line and column."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []

    def add(self, line: int, column: str, text: str) -> None:
        self.problems.append(f"{self.path}:{line} {column}: {text}")

    def raise_any(self) -> None:
        if self.problems:
            more = len(self.problems) - _MOST_PROBLEMS
            shown = self.problems[:_MOST_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
            raise InputError("\n".join(shown))

    def header(self, names: Sequence[str], columns: Sequence[Column]) -> list[tuple[Column, float] | None]:
        """For each written column what it is and the factor to seconds or bytes; None where it has a problem."""
        known = {column.name: column for column in columns}
        found: list[tuple[Column, float] | None] = []
        seen: set[str] = set()
        for written in names:
            name, _, unit = written.partition(" [")
            column = known.get(name)
            entry: tuple[Column, float] | None = None
            if column is None:
                self.add(2, written, f"is no column of this table. It has {', '.join(known)}.")
            elif name in seen:
                self.add(2, name, "stands twice. Leave one out.")
            elif column.kind not in UNITS:
                entry = (column, 1.0)
                if unit:
                    self.add(2, name, "has no unit. Take the brackets away.")
            elif unit.rstrip("]") not in UNITS[column.kind] or not unit.endswith("]"):
                units = ", ".join(UNITS[column.kind])
                self.add(2, name, f"has no known unit. Write `{name} [UNIT]` with one of {units}.")
            else:
                entry = (column, UNITS[column.kind][unit[:-1]])
            seen.add(name)
            found.append(entry)
        for name, column in known.items():
            if name not in seen and not column.optional:
                self.add(2, name, "is missing. Add the column.")
        return found

    def value(self, line: int, column: Column, factor: float, text: str) -> str | int | float | None:
        """A cell's value in SI units, None where it is empty or wrong."""
        text = text.strip()
        if not text:
            if not column.optional:
                self.add(line, column.name, "is empty. Give a value or leave the row out.")
            return None
        if column.kind == "text":
            return text
        try:
            number = int(text) if column.kind == "count" else float(text)
        except ValueError:
            what = "a whole number" if column.kind == "count" else "a number"
            self.add(line, column.name, f'"{text}" is not {what}. Mend or remove the row.')
            return None
        if column.kind == "count" and number < 1:
            self.add(line, column.name, f"{text} is not above 0. Mend or remove the row.")
            return None
        if not math.isfinite(number) or number < 0:
            self.add(line, column.name, f"{text} is negative or not finite. Mend or remove the row.")
            return None
        return number if column.kind == "count" else number * factor


def read_table(path: Path, table: str, columns: Sequence[Column]) -> list[Row]:
    """The rows of a profile file, times in seconds and sizes in bytes; a missing optional column is None.

    Raises InputError, a line per problem with file, line and column: another table or version, an unknown or missing
    column, a missing unit, a value that is empty, no number, negative or not finite, a row that stands twice.
    """
    reader = _Reader(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}). Name a profile file.") from None
    wanted = f"# hethub profile {table} {VERSION}"
    if not lines or lines[0].strip() != wanted:
        raise InputError(
            f"{path}:1: the first line is not `{wanted}`. Name a file of that table and version."
        )
    cells = list(csv.reader(lines[1:]))
    if not cells:
        raise InputError(f"{path}:2: has no header. Name the columns.")
    header = reader.header(cells[0], columns)
    rows: list[Row] = []
    first: dict[tuple[object, ...], int] = {}
    keys = [column.field for column in columns if column.key]
    for line, texts in enumerate(cells[1:], start=3):
        if not texts:
            continue
        if len(texts) != len(header):
            reader.add(line, "row", f"has {len(texts)} values for {len(header)} columns. Mend the row.")
            continue
        row: Row = {column.field: None for column in columns}
        for entry, text in zip(header, texts, strict=True):
            if entry is not None:
                row[entry[0].field] = reader.value(line, *entry, text)
        rows.append(row)
        key = tuple(row[name] for name in keys)
        if None not in key and first.setdefault(key, line) != line:
            reader.add(line, "row", f"repeats line {first[key]} ({', '.join(keys)}). Leave one out.")
    reader.raise_any()
    return rows


def write_table(
    path: Path, table: str, columns: Sequence[Column], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write a profile file whole or not at all: times in ms, sizes in bytes, ten digits."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(f"# hethub profile {table} {VERSION}\n")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            f"{column.name} [{_WRITTEN[column.kind]}]" if column.kind in UNITS else column.name
            for column in columns
        )
        for row in rows:
            writer.writerow(_written(column, row[column.field]) for column in columns)


def _written(column: Column, value: object) -> str:
    if value is None:
        return ""
    if column.kind in UNITS:
        assert isinstance(value, int | float)
        return format(value / UNITS[column.kind][_WRITTEN[column.kind]], ".10g")
    return format(value, ".4g") if column.kind == "ratio" else str(value)
