"""Silent hosts: named after six seconds in which others were looked at too, and nobody else is."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from hethub.launch.host_watch import HOST_SILENT_SECONDS, HostWatch


class Scene:
    """Hosts that answer within the look after they were asked, save those that are `silent`."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.now = 0.0
        self.hosts = list(hosts)
        self.silent: set[str] = set()
        self.asked: list[str] = []
        self.watch: HostWatch[str] = HostWatch(lambda: self.now)

    def look(self, seconds: float) -> list[str]:
        """What a look tells, so many seconds after the one before."""
        self.now += seconds
        return sorted(self.watch.look(self.hosts, self._ask, self._answered))

    def _ask(self, host: str) -> str:
        self.asked.append(host)
        return host

    def _answered(self, references: list[str]) -> list[str]:
        return [host for host in references if host not in self.silent]


@given(
    st.lists(st.floats(0.01, 100.0), min_size=1, max_size=60),
    st.sets(st.sampled_from("abc")),
)
def test_who_answers_is_never_named_and_who_does_not_is_once_it_has_been_silent_for_long(
    pauses: list[float], silent: set[str]
) -> None:
    """Seen to catch: all of the time between two looks counted, so that a driver that was stopped for a minute itself
    gave up every host."""
    scene = Scene("abc")
    scene.look(0.0)
    assert sorted(scene.asked) == ["a", "b", "c"]
    scene.silent = silent
    counted = 0.0
    for pause in pauses:
        found = scene.look(pause)
        counted += min(pause, 3.0)
        if counted > HOST_SILENT_SECONDS + 1e-6:
            assert found == sorted(silent)
            return
        assert found == [] or counted > HOST_SILENT_SECONDS - 1e-6


def test_a_host_that_is_back_is_asked_again_and_one_that_is_gone_is_forgotten() -> None:
    scene = Scene("ab")
    scene.look(0.0)
    scene.silent = {"b"}
    for _ in range(4):
        assert scene.look(1.0) == []
    scene.silent = set()
    assert scene.look(1.0) == []
    scene.silent = {"b"}  # the silence before counts no more
    assert [scene.look(1.0) for _ in range(4)] == [[]] * 4
    scene.hosts.remove("b")
    assert [scene.look(1.0) for _ in range(9)] == [[]] * 9


def test_a_host_is_asked_a_second_after_its_answer_and_not_at_every_look() -> None:
    scene = Scene("a")
    for _ in range(50):
        scene.look(0.1)
    assert 3 <= len(scene.asked) <= 5
