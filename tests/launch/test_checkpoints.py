"""Real training, saved and gone on with: the same bits under the same plan, the same training under any other."""

from __future__ import annotations

import threading
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from hethub.checkpoints.manifest import TrainingSpec
from hethub.checkpoints.store import Store, verify_checkpoint
from hethub.cost.shapes import Parameter
from hethub.launch import saving
from hethub.launch.compiled import compile_plan
from hethub.launch.history import HistorySettings, read_history
from hethub.launch.history_check import check_history, compare_histories
from hethub.launch.keeper import Keeper, SaveCounts
from hethub.launch.optimizer import Updater
from hethub.launch.saving import CheckpointSettings, Saved, Saver
from hethub.launch.shards import Shards
from hethub.program.ownership import Ownership, Slice
from hethub.specs.job import CheckpointPolicy, Fault
from hethub.specs.llama_config import config_of
from hethub.specs.plan import Plan
from tests.launch.pool import SETTINGS, Pool, Trained
from tests.plan_strategies import NAMED_PLANS, six_plans

STEPS, AT = 6, 3
PLANS = six_plans()


def training_of(plan: Plan, pool: Pool) -> TrainingSpec:
    workload = plan.workload
    return TrainingSpec(
        seed=1,
        steps=STEPS,
        sequence_length=workload.sequence_length,
        global_batch=workload.global_batch,
        precision=workload.precision,
        held_out=0.2,
        tokens=pool.tokens.digest,
        optimizer=asdict(SETTINGS),
        model=config_of(workload.model),
    )


def keeper_of(
    pool: Pool, plan: Plan, folder: Path, counts: SaveCounts, told: list[str], start: int = 0
) -> Keeper:
    return Keeper(
        Store(folder),
        CheckpointPolicy(every=AT, keep=2, notice_seconds=30),
        compile_plan(plan),
        training_of(plan, pool),
        SETTINGS,
        run="test",
        attempt=1,
        start=start,
        counts=counts,
        may_commit=lambda: True,
        say=told.append,
    )


def saved(pool: Pool, plan: Plan, folder: Path, **options: object) -> tuple[Trained, SaveCounts, list[str]]:
    """Train all steps, with a checkpoint after AT of them and at the end."""
    checkpoint = CheckpointSettings(folder=folder, attempt=1, every=AT)
    trained = pool.train(plan, STEPS, held_out_rows=0, checkpoint=checkpoint, **options)  # type: ignore[arg-type]
    counts, told = SaveCounts(), []  # type: ignore[var-annotated]
    keeper = keeper_of(pool, plan, folder, counts, told)
    reports: list[list[Saved]] = pool.call("all_saved")
    keeper.take(dict(enumerate(reports)))
    return trained, counts, told


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Trained, Path]]:
    """Each of the six plans, trained without a break, and its checkpoint after AT steps."""
    found = {}
    for name, plan in PLANS.items():
        folder = tmp_path_factory.mktemp("saved") / "checkpoints"
        trained, counts, told = saved(pool, plan, folder)
        assert (counts.made, counts.failed, told) == (1, 0, [])
        found[name] = (trained, folder / f"step-{AT:08d}")
    return found


def test_what_is_written_is_whole_and_is_what_was_trained(runs: dict[str, tuple[Trained, Path]]) -> None:
    for _, path in runs.values():
        manifest = verify_checkpoint(path)
        assert (manifest.step, manifest.updates) == (AT, AT)
        assert manifest.saved_bytes <= 1.05 * manifest.state_bytes


@pytest.mark.parametrize("name", PLANS)
def test_the_same_plan_goes_on_bit_by_bit(
    pool: Pool, runs: dict[str, tuple[Trained, Path]], name: str
) -> None:
    """Seen to catch: the count of updates, a moment, or the masters not restored."""
    unbroken, path = runs[name]
    again = pool.train(PLANS[name], STEPS, held_out_rows=0, first=AT, restore=path)
    assert [x.hex() for x in again.losses] == [x.hex() for x in unbroken.losses[AT:]]
    assert [x.hex() for x in again.norms] == [x.hex() for x in unbroken.norms[AT:]]
    for key, value in unbroken.weights.items():
        assert np.array_equal(again.weights[key], value)


@pytest.mark.parametrize(("writer", "reader"), [pair for pair in product(PLANS, PLANS) if pair[0] != pair[1]])
def test_another_plan_goes_on_with_the_same_training(
    pool: Pool, runs: dict[str, tuple[Trained, Path]], writer: str, reader: str
) -> None:
    unbroken, path = runs[writer]
    again = pool.train(PLANS[reader], STEPS, held_out_rows=0, first=AT, restore=path)
    assert again.losses[0] == pytest.approx(unbroken.losses[AT], rel=1e-6)
    np.testing.assert_allclose(again.losses, unbroken.losses[AT:], rtol=1e-5)
    read = sum(answer.bytes_read for answer in pool.fetched)
    assert read > 0


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_other_precisions_go_on_bit_by_bit(pool: Pool, tmp_path: Path, precision: str) -> None:
    """In bf16 the weight is its master rounded, and only the master is kept."""
    plan = NAMED_PLANS["rows 3 + 1"](precision)
    unbroken, counts, _ = saved(pool, plan, tmp_path / "c")
    assert counts.made == 1
    again = pool.train(plan, STEPS, held_out_rows=0, first=AT, restore=tmp_path / "c" / f"step-{AT:08d}")
    assert [x.hex() for x in again.losses] == [x.hex() for x in unbroken.losses[AT:]]


def test_the_histories_of_both_parts_are_one_training(pool: Pool, tmp_path: Path) -> None:
    plan = PLANS["unequal rows"]

    def history(folder: str, attempt: int) -> HistorySettings:
        (tmp_path / folder).mkdir(exist_ok=True)
        return HistorySettings(
            folder=tmp_path / folder, run="test", attempt=attempt, plan="a", digest_every=2
        )

    saved(pool, plan, tmp_path / "c", history=history("unbroken", 1))
    path = tmp_path / "c" / f"step-{AT:08d}"
    pool.train(plan, AT + 1, total_steps=STEPS, held_out_rows=0, history=history("broken", 1))
    pool.train(plan, STEPS, held_out_rows=0, first=AT, restore=path, history=history("broken", 2))
    (unbroken, wrong), (broken, also_wrong) = (
        read_history(tmp_path / "unbroken"),
        read_history(tmp_path / "broken"),
    )
    assert wrong == also_wrong == []
    assert check_history(broken, STEPS) == []
    assert compare_histories(broken, unbroken) == []


def test_where_a_device_cannot_write_there_is_no_checkpoint_and_training_goes_on(
    pool: Pool, tmp_path: Path
) -> None:
    plan = PLANS["unequal rows"]
    plain = pool.train(plan, STEPS, held_out_rows=0)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    Store(folder).partial(AT, 1).write_text("in the way")
    trained, counts, told = saved(pool, plan, folder)
    assert trained.losses == plain.losses
    assert (counts.made, counts.failed) == (0, 1)
    assert told[0].startswith(f"warning: no checkpoint after step {AT}, training goes on: a/0/0: ")
    assert Store(folder).listed() == []


def test_after_a_checkpoint_that_could_not_be_written_the_next_one_is(pool: Pool, tmp_path: Path) -> None:
    plan, folder = PLANS["unequal rows"], tmp_path / "checkpoints"
    folder.mkdir()
    Store(folder).partial(2, 1).write_text("in the way")
    pool.train(plan, STEPS, held_out_rows=0, checkpoint=CheckpointSettings(folder=folder, attempt=1, every=2))
    counts, told = SaveCounts(), []  # type: ignore[var-annotated]
    keeper = keeper_of(pool, plan, folder, counts, told)
    keeper.take(dict(enumerate(pool.call("all_saved"))))
    assert (counts.made, counts.failed, len(told)) == (1, 1, 1)
    assert [one.step for one in Store(folder).listed()] == [4]
    verify_checkpoint(folder / "step-00000004")


def test_a_step_that_one_device_could_not_save_is_given_up_for_all(pool: Pool, tmp_path: Path) -> None:
    """Seen to catch: a manifest made of the files that are there."""
    plan, folder = PLANS["unequal rows"], tmp_path / "checkpoints"
    Store(folder).partial(AT, 1).mkdir(parents=True)
    (Store(folder).partial(AT, 1) / "b-0-0.state").write_text("in the way")
    _, counts, told = saved(pool, plan, folder)
    assert (counts.made, counts.failed) == (0, 1) and "b/0/0" in told[0]
    assert Store(folder).listed() == [] and not Store(folder).partial(AT, 1).exists()


def test_a_step_that_is_skipped_makes_no_update_on_any_device(pool: Pool, tmp_path: Path) -> None:
    """Seen to catch: the count of updates advanced by a skipped step."""
    plan = PLANS["unequal rows"]
    fault = Fault(
        device=2,  # b/0/0
        step=1,
        action="backward stage 0 micro-batch 0",
        phase="during",
        do="nan",
        factor=2.0,
        place="",
    )
    trained, _, _ = saved(pool, plan, tmp_path / "c", faults=[fault], skips=True)
    assert [np.isfinite(norm) for norm in trained.norms] == [True, False, *[True] * (STEPS - 2)]
    manifest = verify_checkpoint(tmp_path / "c" / f"step-{AT:08d}")
    assert (manifest.step, manifest.updates) == (AT, AT - 1)
    again = pool.train(
        plan, STEPS, held_out_rows=0, first=AT, restore=tmp_path / "c" / f"step-{AT:08d}", skips=True
    )
    assert [x.hex() for x in again.losses] == [x.hex() for x in trained.losses[AT:]]


def test_an_overlapping_save_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot of the first stays as it was taken."""
    shards = Shards(
        Ownership((Parameter("w", (4, 2), "none", 0, 1, (0,)),), (Slice(0, 0, 4, 8, (0,), 0),)),
        {"w": torch.arange(8.0).view(4, 2)},
        {"w": torch.ones(4, 2)},
        {"w": 0},
    )
    updater = Updater(shards, [[0]], SETTINGS)
    saver = Saver(CheckpointSettings(folder=tmp_path, attempt=1, every=1), "a/0/0", updater)
    may_write, real = threading.Event(), saving.write_state_file

    def slow(path: Path, data: memoryview, block_bytes: int) -> str:
        assert may_write.wait(30)
        return real(path, data, block_bytes)

    monkeypatch.setattr(saving, "write_state_file", slow)
    saver.save(1)
    shards.weights["w"].fill_(-1.0)  # training goes on
    saver.save(2)
    may_write.set()
    first, second = sorted(saver.wait(), key=lambda report: report.step)
    saver.close()
    assert (first.step, first.problem) == (1, "")
    assert second.problem == "the checkpoint before it is still being written"
    written = (Store(tmp_path).partial(1, 1) / "a-0-0.state").read_bytes()
    assert np.frombuffer(written[:32], np.float32).tolist() == list(range(8))


def test_a_driver_that_has_lost_the_run_makes_no_checkpoint(pool: Pool, tmp_path: Path) -> None:
    """Seen to catch: the lease not asked before the commit."""
    plan, told = PLANS["unequal rows"], []  # type: ignore[var-annotated]
    counts = SaveCounts()
    keeper = keeper_of(pool, plan, tmp_path, counts, told)
    keeper._may_commit = lambda: False
    report = Saved(
        step=AT, bytes=1, block_bytes=4096, digest="0" * 64, updates=AT, stall_seconds=0.0, seconds=0.0
    )
    keeper.take({device: [report] for device in compile_plan(plan).program.layout.used})
    assert (counts.made, counts.failed) == (0, 1)
    assert "another driver has taken the run over" in told[0]
    assert not keeper.expects(AT)
