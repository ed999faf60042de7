"""The one YAML loader: a safe subset of YAML 1.2, with the line and column of every value.

Refused: aliases and anchors, tags, duplicate keys, several documents, text that is not UTF-8, not-a-number
and infinity, and whatever exceeds the bounds below. Plain scalars follow the YAML 1.2 core schema, so that
`3e-4` is a number and `no`, `on` and `12:30` are text. Keys are always text. JSON is read as YAML.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hethub.errors import InputError, printable
from hethub.specs.yaml_text import dump_yaml

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_NODES",
    "Document",
    "Key",
    "dump_yaml",
    "key_path",
    "load_document",
    "parse_document",
]

Key = str | int

MAX_BYTES = 10_000_000
MAX_DEPTH = 32
MAX_NODES = 500_000

_EVENTS: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is some 20 times as fast

_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_LARGEST_INTEGER = 2**63


def key_path(keys: Sequence[Key]) -> str:
    """How messages name a place: ("node_groups", 2, "count") is `node_groups[2].count`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


class Document:
    """A parsed file: `value` in plain Python, and where each part of it stands."""

    def __init__(self, path: Path, value: Any, root: Any, marks: dict[int, Any]) -> None:
        self.path = path
        self.value = value
        self._root = root
        # By identity of the container, then by key or index. The containers live as long as `value` does.
        self._marks = marks

    def where(self, keys: Sequence[Key] = ()) -> str:
        """`file:line:column` of a key (of an entry of a list: of its value).

        Where the file has no such key, the nearest one around it that it has.
        """
        mark, at = self._root, self.value
        for key in keys:
            marks = self._marks.get(id(at))
            try:
                mark, at = marks[key], at[key]  # type: ignore[index]  # None is caught
            except (KeyError, IndexError, TypeError):
                break
        return f"{self.path}:{mark.line + 1}:{mark.column + 1}"

    def error(self, keys: Sequence[Key], text: str) -> InputError:
        """An InputError about one key: `text` says what is wrong and what to do."""
        return InputError(self.line(keys, text))

    def line(self, keys: Sequence[Key], text: str) -> str:
        """One line of a message: place, key, what is wrong."""
        return " ".join(filter(None, (self.where(keys), printable(key_path(keys))))) + f": {printable(text)}"


class _RefusedError(Exception):
    """Something this loader does not take, at a mark."""

    def __init__(self, mark: Any, text: str) -> None:
        super().__init__(text)
        self.mark = mark
        self.text = text


def _plain(text: str, mark: Any) -> Any:
    """The value of an unquoted scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "+-.0123456789":
        return text
    if _INTEGER.fullmatch(text):
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        # Few digits first: int() of a very long text is slow and, in base 10, refused by Python itself.
        number = int(text, base) if len(text) < 30 else _LARGEST_INTEGER
        if abs(number) >= _LARGEST_INTEGER:
            raise _RefusedError(mark, "this whole number does not fit into 64 bits. Write a smaller one.")
        return number
    if _FLOAT.fullmatch(text):
        real = float(text)
        if math.isinf(real):
            raise _RefusedError(mark, "this number is too large for a double. Write a smaller one.")
        return real
    if _NOT_FINITE.fullmatch(text):
        raise _RefusedError(mark, f"{text} is not a finite number. Write a finite one.")
    return text


class _Builder:
    """Turns the parser's events into plain values, iteratively, so that depth costs no stack."""

    def __init__(self) -> None:
        self.root: Any = None
        self.root_mark: Any = None
        self.marks: dict[int, Any] = {}
        self._open: list[tuple[Any, Any]] = []  # containers around the current place, each with its marks
        self._key: str | None = None  # of the innermost mapping, when its value comes next
        self._keys: list[str | None] = []
        self._nodes = 0
        self._documents = 0

    def take(self, event: Any) -> None:
        """One more event."""
        kind = type(event)
        if kind is yaml.ScalarEvent:
            self._check(event)
            if self._open and self._awaits_key():
                self._take_key(event)
            else:
                plain = event.implicit[0] and not event.style
                self._put(_plain(event.value, event.start_mark) if plain else event.value, event.start_mark)
        elif kind in (yaml.MappingStartEvent, yaml.SequenceStartEvent):
            self._check(event)
            self._begin({} if kind is yaml.MappingStartEvent else [], event.start_mark)
        elif kind in (yaml.MappingEndEvent, yaml.SequenceEndEvent):
            self._open.pop()
            self._key = self._keys.pop()
        elif kind is yaml.AliasEvent:
            raise _RefusedError(
                event.start_mark, f"aliases (*{event.anchor}) are not taken. Write the value out."
            )
        elif kind is yaml.DocumentStartEvent:
            self._documents += 1
            if self._documents > 1:
                raise _RefusedError(event.start_mark, "a second document begins here. Keep one per file.")

    def _awaits_key(self) -> bool:
        return self._key is None and type(self._open[-1][0]) is dict

    def _check(self, event: Any) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise _RefusedError(
                event.start_mark, f"the file has more than {MAX_NODES} values. Split or shorten it."
            )
        if event.anchor is not None:
            raise _RefusedError(event.start_mark, f"anchors (&{event.anchor}) are not taken. Remove it.")
        if event.tag is not None:
            raise _RefusedError(event.start_mark, f"tags ({event.tag}) are not taken. Remove it.")

    def _begin(self, container: Any, mark: Any) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise _RefusedError(mark, f"values are nested more than {MAX_DEPTH} deep. Flatten them.")
        if self._open and self._awaits_key():
            raise _RefusedError(mark, "a key must be text. Write a word, or quote it.")
        marks: Any = {}
        self._put(container, mark)
        self.marks[id(container)] = marks
        self._open.append((container, marks))
        self._keys.append(self._key)
        self._key = None

    def _take_key(self, event: Any) -> None:
        container, marks = self._open[-1]
        if event.value in container:
            first = marks[event.value].line + 1
            raise _RefusedError(
                event.start_mark,
                f"the key {event.value!r} stands here again (first on line {first}). Keep one.",
            )
        self._key = event.value
        marks[event.value] = event.start_mark

    def _put(self, value: Any, mark: Any) -> None:
        if not self._open:
            self.root, self.root_mark = value, mark
            return
        container, marks = self._open[-1]
        if self._key is None:
            marks[len(container)] = mark
            container.append(value)
        else:
            container[self._key] = value
            self._key = None


def parse_document(text: str, path: Path) -> Document:
    """Parse YAML text; `path` is for messages only. Raises InputError on what it does not take."""
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{path}:1:1: the text is not valid Unicode. Save it as UTF-8.") from None
    return _parse(content, path)


def load_document(path: Path) -> Document:
    """Read and parse a YAML or JSON file. Raises InputError when it is missing, too large or wrong."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Check the path.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read: {reason}. Give a readable file.") from None
    return _parse(content, path)


def _parse(content: bytes, path: Path) -> Document:
    if len(content) > MAX_BYTES:
        raise InputError(f"{path}: larger than {MAX_BYTES // 10**6} MB. Split or shorten it.")
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    builder = _Builder()
    try:
        parser = _EVENTS(content)
        while parser.check_event():
            builder.take(parser.get_event())
    except _RefusedError as error:
        raise InputError(f"{path}:{error.mark.line + 1}:{error.mark.column + 1}: {error.text}") from None
    except yaml.MarkedYAMLError as error:
        raise InputError(_syntax(error, path)) from None
    except yaml.YAMLError as error:
        raise InputError(
            f"{path}: not YAML: {' '.join(str(error).split())}. Remove control characters."
        ) from None
    if builder.root_mark is None:
        raise InputError(f"{path}: the file is empty. Write its keys.")
    return Document(path, builder.root, builder.root_mark, builder.marks)


def _syntax(error: yaml.MarkedYAMLError, path: Path) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
    what = " ".join(filter(None, (error.problem, error.context)))
    return (
        f"{place}: not YAML: {' '.join(what.split())}. Check indentation, brackets, quotes and colons here."
    )
