"""Unknown names: the known one that was probably meant, and the text that says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest", "unknown_name"]

_SHOWN_NAMES = 16


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, whatever the case, or None when none is.

    A name that begins with it comes first (MI250 means MI250X-GCD, not MI325X), then the most alike.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    lower = name.lower()
    longer = [candidate for candidate in by_lower if lower and candidate.startswith(lower)]
    found = longer or difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def unknown_name(what: str, name: str, known: Iterable[str], *, likely: str | None = None) -> str:
    """`what` is wrong with `name`, the nearest known name (else `likely`), then all (or the most alike)."""
    names = list(known)
    like = nearest(name, names) or likely
    hint = f' Did you mean "{like}"?' if like else ""
    rest = len(names) - _SHOWN_NAMES
    if rest > 0:
        names = _most_alike(name, names)
    shown = ", ".join(names) + (f" and {rest} more" if rest > 0 else "")
    return f"{what}.{hint} Known: {shown or 'none'}."


def _most_alike(name: str, known: list[str]) -> list[str]:
    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()

    return sorted(known, key=likeness, reverse=True)[:_SHOWN_NAMES]
