"""Who keeps the job, from the places of all workers: the stuck device and never one that waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from hethub.launch.beacon import Beacon
from hethub.launch.stall import Stall, StallWatch
from hethub.program.actions import Program
from hethub.program.compile import compile_program
from hethub.specs.layout import lay_out
from hethub.timeline.record import Kind
from tests.plan_strategies import NAMED_PLANS, compute_model, joined


@dataclass
class Scene:
    """A program, its beacon, a clock that the test sets, and a watch."""

    program: Program
    beacon: Beacon
    watch: StallWatch
    now: list[float]

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last device used: of a pipeline of 2, its stages."""
        return self.program.layout.used[0], self.program.layout.used[-1]

    def put(self, device: int, kind: Kind, micro_batch: int = 0, step: int = 1) -> None:
        """Place a device at its first action of this kind and micro-batch."""
        actions = self.program.devices[device]
        number = next(n for n, a in enumerate(actions) if a.kind == kind and a.micro_batch == micro_batch)
        self.beacon.set(device, step, number)

    def end(self, device: int, step: int = 1) -> None:
        """Place a device after its list."""
        self.beacon.set(device, step, len(self.program.devices[device]))

    def look(self, seconds: float) -> Stall | None:
        """What the watch tells after a while in which nobody moved."""
        self.watch.look(self.program.layout.used)
        self.now[0] += seconds
        return self.watch.look(self.program.layout.used)


def scene(
    folder: Path,
    plan: str,
    *,
    predicted_seconds: float = 0.5,
    emulated: bool = True,
    islands: Mapping[int, int] | None = None,
) -> Scene:
    made = NAMED_PLANS[plan]("fp32")
    compute = compute_model(made)
    program = compile_program(lay_out(made), compute, islands=joined(islands))
    count = len(compute.graph.devices)
    Beacon.create(folder / "beacon", count)
    beacon = Beacon(folder / "beacon", count)
    now = [100.0]
    watch = StallWatch(
        program, beacon, lambda device, action: predicted_seconds, emulated=emulated, now=lambda: now[0]
    )
    return Scene(program, beacon, watch, now)


def test_a_receiver_waits_for_its_sender_which_is_named(tmp_path: Path) -> None:
    s = scene(tmp_path, "pipeline of 2")
    first, last = s.ends
    s.put(first, Kind.FORWARD)
    s.put(last, Kind.RECEIVE)
    stall = s.look(5.5)
    assert stall is not None
    assert (stall.device, stall.waiting, stall.predicted_seconds) == (first, (last,), 0.5)
    assert stall.seconds == pytest.approx(5.5)


def test_a_receiver_whose_message_was_sent_is_named_itself(tmp_path: Path) -> None:
    s = scene(tmp_path, "pipeline of 2")
    first, last = s.ends
    s.put(first, Kind.FORWARD, micro_batch=1)
    s.put(last, Kind.RECEIVE)
    s.look(5.5)
    s.put(first, Kind.RECEIVE)  # the gradient, which only the last stage can send
    stall = s.look(5.5)
    assert stall is not None and (stall.device, stall.waiting) == (last, (first,))


def test_a_device_within_its_limit_keeps_nobody_however_long_others_wait(tmp_path: Path) -> None:
    s = scene(tmp_path, "pipeline of 2", predicted_seconds=3.0)
    first, last = s.ends
    s.put(first, Kind.FORWARD)
    s.put(last, Kind.RECEIVE)
    assert s.look(14.9) is None  # five times three seconds
    assert s.look(0.2) is not None


def test_a_device_that_moves_is_not_stuck(tmp_path: Path) -> None:
    s = scene(tmp_path, "pipeline of 2")
    first, last = s.ends
    for micro_batch in range(4):
        s.put(first, Kind.FORWARD, micro_batch=micro_batch)
        s.put(last, Kind.RECEIVE, micro_batch=micro_batch)
        assert s.look(4.0) is None


def test_a_group_waits_for_the_member_that_is_not_there(tmp_path: Path) -> None:
    s = scene(tmp_path, "heads 6 + 2")
    first, late, *_ = s.program.groups[s.program.layout.used[0], 0]
    s.put(first, Kind.FORWARD, micro_batch=1)
    s.put(late, Kind.FORWARD, micro_batch=0)
    stall = s.look(5.5)
    assert stall is not None
    assert stall.device == late and first in stall.waiting


def test_a_collective_waits_for_the_member_that_has_not_joined_it(tmp_path: Path) -> None:
    s = scene(tmp_path, "rows 5 + 2 + 1", islands=dict.fromkeys(range(6), 0))
    one, late, other = s.program.layout.used
    for device, kind in ((one, Kind.RECEIVE), (late, Kind.BACKWARD), (other, Kind.RECEIVE)):
        number = next(
            n
            for n, action in enumerate(s.program.devices[device])
            if action.kind == kind and not s.program.carried(action)
        )
        s.beacon.set(device, 1, number)
    stall = s.look(5.5)
    assert stall is not None
    assert (stall.device, stall.waiting) == (late, (one, other))


def test_any_member_of_a_group_that_has_met_may_be_the_one(tmp_path: Path) -> None:
    s = scene(tmp_path, "heads 6 + 2")
    group = s.program.groups[s.program.layout.used[0], 0]
    for device in group:
        s.put(device, Kind.FORWARD)
    stall = s.look(5.5)
    assert stall is not None and stall.members == group


def test_a_real_device_may_take_its_time_over_the_first_step_and_as_long_as_it_ever_took(
    tmp_path: Path,
) -> None:
    s = scene(tmp_path, "pipeline of 2", emulated=False)
    first, last = s.ends
    s.put(first, Kind.FORWARD, step=0)
    s.put(last, Kind.RECEIVE, step=0)
    assert s.look(50.0) is None
    s.put(first, Kind.FORWARD, step=1)
    s.put(last, Kind.RECEIVE, step=1)
    assert s.look(200.0) is None  # its first forward took 50 seconds
    assert s.look(51.0) is not None


def test_a_device_between_two_steps_has_a_minute(tmp_path: Path) -> None:
    """It may be digesting its weights for the history."""
    s = scene(tmp_path, "pipeline of 2")
    first, last = s.ends
    s.end(first)
    s.put(last, Kind.RECEIVE, step=2)
    assert s.look(55.0) is None
    stall = s.look(6.0)
    assert stall is not None and stall.device == first
