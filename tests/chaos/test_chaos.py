"""What takes minutes: `make chaos`. Seeds are printed, so that a failure can be run again."""

from __future__ import annotations

import os
import random
import secrets
import shutil
from pathlib import Path

import pytest

from benchmarks.bench.damage import DAMAGES
from benchmarks.bench.kills import kill_points, kinds_of
from hethub.checkpoints.manifest import CheckpointError
from hethub.checkpoints.reshard import Reader, needs
from hethub.checkpoints.store import Store, open_checkpoint, verify_checkpoint
from tests.chaos.three_types import check_invariants, launch, write_job
from tests.checkpoints.made import make_checkpoint
from tests.launch.small_job import listing
from tests.plan_strategies import compile_plan, six_plans
from tests.specs.mutated import READERS, refused_or_read, write_good_files

pytestmark = pytest.mark.chaos

POINTS = 200
FILES = 99_999
SECONDS = 3000.0


def new_seed() -> int:
    """HETHUB_CHAOS_SEED, or another one every time."""
    return int(os.environ.get("HETHUB_CHAOS_SEED", "0")) or secrets.randbelow(10**6)


@pytest.mark.timeout(SECONDS)
def test_two_hundred_killed_workers_over_every_kind_of_action_and_phase(tmp_path: Path) -> None:
    """One run that loses a worker in nearly every step is the run that loses none."""
    seed, steps = new_seed(), POINTS + 10
    print(f"seed {seed}")  # noqa: T201
    write_job(tmp_path / "unbroken", steps=steps)
    unbroken = launch(tmp_path / "unbroken", seconds=SECONDS)
    write_job(tmp_path / "killed")
    plan = tmp_path / "killed" / "plan.yaml"
    points = kill_points(plan, seed, POINTS, steps, every=2)
    assert kinds_of(points, plan) == kinds_of(
        kill_points(plan, seed, 60, steps, every=2), plan
    )  # all, by 60 already
    policy = {"restart": "same", "max_restarts": POINTS}
    write_job(
        tmp_path / "killed", steps=steps, fault=points, on_failure=policy, checkpoint={"every": 2, "keep": 2}
    )
    ran = launch(tmp_path / "killed", seconds=SECONDS)
    check_invariants(ran, unbroken, steps)
    assert ran.killed() == POINTS


@pytest.mark.timeout(600)
def test_a_thousand_damaged_checkpoints_are_never_read_and_the_one_before_is(tmp_path: Path) -> None:
    """None is loaded without a word."""
    seed = new_seed()
    print(f"seed {seed}")  # noqa: T201
    chosen = random.Random(seed)
    plans = six_plans()
    programs = {name: compile_plan(plan) for name, plan in plans.items()}
    silent = []
    for number in range(1000):
        name = sorted(plans)[number % len(plans)]
        whole = tmp_path / name.replace(" ", "-")
        if not whole.exists():
            for step in (5, 10):
                make_checkpoint(whole, plans[name], programs[name], step, seed=step)
        damage = chosen.choice(DAMAGES if len(programs[name].layout.used) > 1 else DAMAGES[:-1])
        copy = Path(shutil.copytree(whole, tmp_path / "copy"))
        damage(copy / "step-00000010", chosen)
        try:
            read_whole(copy / "step-00000010", programs[sorted(plans)[(number // 6) % len(plans)]])
            silent.append((number, name, damage.__name__))
        except CheckpointError:
            pass
        intact = [one for one in Store(copy).listed() if one.manifest is not None]
        assert intact[-1].step == 5
        verify_checkpoint(intact[-1].path)
        shutil.rmtree(copy)
    assert silent == []


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", READERS)
def test_a_hundred_thousand_files_that_are_nearly_right_are_read_or_refused(
    tmp_path: Path, name: str
) -> None:
    """With tests/specs/test_mutated.py."""
    write_good_files(tmp_path)
    seed = new_seed()
    print(f"seed {seed}")  # noqa: T201
    before = set(listing(tmp_path))
    for number in range(FILES // len(READERS)):
        refused_or_read(tmp_path, name, seed * FILES + number)
    assert set(listing(tmp_path)) - before == {f"changed-{name}"}


def read_whole(folder: Path, program) -> None:
    """As all devices of another plan read it, none of them using anything before all have read."""
    manifest = open_checkpoint(folder)
    for device in program.layout.used:
        with Reader(folder, manifest) as reader:
            for need in needs(program, device):
                reader.read(need)
