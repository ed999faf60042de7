"""Plain values as readable YAML: block style, with short leaf lists and mappings on one line."""

from __future__ import annotations

import json
import math
import re
from typing import Any

__all__ = ["dump_yaml"]

_WIDTH = 110

# What may stand unquoted, for this project's loader and for YAML 1.1 readers alike.
_PLAIN = re.compile(r"[A-Za-z_./][A-Za-z0-9_./+()%*@-]*( [A-Za-z0-9_./+()%*@=-]+)*")
_DIGIT_FIRST = re.compile(r"[1-9][A-Za-z0-9_.-]*[a-df-zA-DF-Z][A-Za-z0-9_.-]*")  # 1f1b, but not 1e5
_WORDS = frozenset(["y", "yes", "n", "no", "on", "off", "true", "false", "null"])
# Characters that JSON lets stand in a string and YAML does not print, or reads as a line break.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def dump_yaml(value: Any) -> str:
    """YAML text that `parse_document` reads back as an equal value.

    Takes what JSON can say: mappings with text keys, lists or tuples, text, numbers, booleans and None.
    Raises ValueError on infinite or not-a-number floats, TypeError on anything else.
    """
    lines: list[str] = []
    _block(value, "", "", lines)
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS and not text.startswith("."):
        return text
    if _DIGIT_FIRST.fullmatch(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)


def _number(value: float) -> str:
    if not math.isfinite(value):
        raise ValueError(f"{value} cannot be written: numbers must be finite")
    text = repr(value)
    # YAML 1.1 readers take 1e-05 for text; 1.0e-05 is a number to all.
    return text if "e" not in text or "." in text else text.replace("e", ".0e")


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return _number(float(value))
    raise TypeError(f"{type(value).__name__} cannot be written as YAML")


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} is not text")
    return _text(key)


def _flow(value: Any, room: int) -> str | None:
    """`value` on one line of at most `room` characters, or None."""
    if isinstance(value, dict):
        opening, closing = "{", "}"
        items = ((f"{_key(key)}: ", item) for key, item in value.items())
    elif isinstance(value, list | tuple):
        opening, closing = "[", "]"
        items = (("", item) for item in value)
    else:
        return _scalar(value)
    parts: list[str] = []
    for prefix, item in items:
        text = _flow(item, room)
        room -= len(prefix) + len(text or "") + 2
        if text is None or room < 0:
            return None
        parts.append(prefix + text)
    return opening + ", ".join(parts) + closing


def _block(value: Any, lead: str, indent: str, lines: list[str]) -> None:
    """Append `value` after `lead` ("key:" or "-", with its own indent), what follows indented by `indent`."""
    nested = isinstance(value, dict | list | tuple)
    # The outermost mapping stays open, however short.
    one_line = _flow(value, _WIDTH - len(lead)) if not nested or not value or lead else None
    if one_line is not None:
        lines.append(f"{lead} {one_line}" if lead else one_line)
        return
    dash = lead.endswith("-")
    if lead and not dash:
        lines.append(lead)
    inner = indent + "  " if lead else ""
    entries = (
        [(f"{_key(key)}:", item) for key, item in value.items()]
        if isinstance(value, dict)
        else [("-", item) for item in value]
    )
    for number, (name, item) in enumerate(entries):
        start = f"{lead} {name}" if dash and number == 0 else inner + name
        _block(item, start, inner, lines)
