"""Which hosts have answered nothing for too long: our own bound, whatever Ray's health checks of its nodes are set to.

A node that is stopped, or cut off, closes no connection, so nobody is told of it; Ray itself takes a minute by its
defaults.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from typing import Any, Generic, TypeVar

__all__ = ["HOST_SILENT_SECONDS", "HostWatch"]

HOST_SILENT_SECONDS = 6.0  # of the 20 s in which a lost node is to be replaced
_ASK_SECONDS = 1.0  # between an answer and the next question
# That one look counts for: a driver that waits for a silent host in other ways looks that seldom.
_MOST_SECONDS = 3.0

Node = TypeVar("Node")


class HostWatch(Generic[Node]):
    """Asks every host again and again, one question at a time."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._asked: dict[Node, Any] = {}
        self._silent: dict[Node, float] = {}
        self._next: dict[Node, float] = {}
        self._looked = now()

    def look(
        self,
        hosts: Iterable[Node],
        ask: Callable[[Node], Any],
        answered: Callable[[list[Any]], Collection[Any]],
    ) -> list[Node]:
        """Hosts that have answered nothing for HOST_SILENT_SECONDS. `ask` returns a reference to an answer to come,
        `answered` says which of several have come, without waiting.

        Time in which nobody looked counts little: a driver that was stopped itself blames no one.
        """
        now = self._now()
        passed, self._looked = min(now - self._looked, _MOST_SECONDS), now
        done = set(answered(list(self._asked.values()))) if self._asked else set()
        lost = []
        known = set(hosts)
        for node in [node for node in self._asked if node not in known]:
            self._forget(node)
        for node in known:
            if node in self._asked and self._asked[node] not in done:
                self._silent[node] += passed
                if self._silent[node] > HOST_SILENT_SECONDS:
                    lost.append(node)
                    self._forget(node)
            elif node in self._asked:
                self._forget(node)
                self._next[node] = now + _ASK_SECONDS
            elif now >= self._next.get(node, now):
                self._asked[node], self._silent[node] = ask(node), 0.0
        return lost

    def _forget(self, node: Node) -> None:
        del self._asked[node], self._silent[node]
        self._next.pop(node, None)
