"""Commands that are one short task make very many small lasting values: collecting cycles again and again would take a
tenth of a small plan's time and half of a big one's."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Without collection of cycles while it lasts; what is there then is put aside, so that the interpreter's end does
    not look through it either."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
