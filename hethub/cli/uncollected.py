"""Commands that are one short task make very many small lasting values: collecting cycles again and again would take a
tenth of a small plan's time and half of a big one's."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uncollected"]


@contextmanager
def uncollected() -> Iterator[None]:
    """Without collection of cycles while it lasts."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
