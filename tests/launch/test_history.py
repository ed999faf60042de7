"""The history of real runs is without fault, and its checker finds what is wrong with a history that is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hethub.launch.history import Entry, HistorySettings, Read, history_file, read_history
from hethub.launch.history_check import check_history
from tests.launch.pool import Pool
from tests.plan_strategies import NAMED_PLANS

STEPS = 4
PLANS = [
    "single device",
    "rows cut differently in each stage",
    "heads 6 + 2",
    "tied embedding on the first and last stage",
]


def settings(folder: Path, attempt: int = 1) -> HistorySettings:
    return HistorySettings(folder=folder, run="test", attempt=attempt, plan="abc", digest_every=2)


def recorded(pool: Pool, folder: Path, plan: str) -> list[Entry]:
    folder.mkdir()
    pool.train(NAMED_PLANS[plan]("fp32"), STEPS, held_out_rows=0, history=settings(folder))
    entries, problems = read_history(folder)
    assert problems == []
    return entries


@pytest.fixture(scope="module")
def history(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> list[Entry]:
    """Of a run whose stages cut the rows differently, so that several devices read parts of the batch."""
    return recorded(pool, tmp_path_factory.mktemp("history") / "h", PLANS[1])


@pytest.mark.parametrize("plan", PLANS)
def test_the_history_of_a_run_is_without_fault(pool: Pool, tmp_path: Path, plan: str) -> None:
    entries = recorded(pool, tmp_path / "h", plan)
    assert check_history(entries, STEPS) == []
    assert {entry.step for entry in entries if entry.digests} == {1, 3}
    assert len({entry.device for entry in entries}) * STEPS == len(entries) == entries[0].devices * STEPS


def test_replicas_on_unlike_cuts_have_slices_in_common(pool: Pool, tmp_path: Path) -> None:
    """Else equal digests would say nothing."""
    entries = recorded(pool, tmp_path / "h", "rows cut differently in each stage")
    last = [set(entry.digests) for entry in entries if entry.step == STEPS - 1]
    assert all(any(own & other for other in last if other is not own) for own in last)


def test_the_losses_are_the_runs_to_the_bit(pool: Pool, tmp_path: Path) -> None:
    trained = pool.train(NAMED_PLANS[PLANS[1]]("fp32"), STEPS, held_out_rows=0, history=settings(tmp_path))
    entries, _ = read_history(tmp_path)
    assert [float.fromhex(e.loss) for e in entries if e.device == entries[0].device] == trained.losses


def changed(entries: Sequence[Entry], which: int, **changes: object) -> list[Entry]:
    return [e.model_copy(update=changes) if n == which else e for n, e in enumerate(entries)]


def reader(entries: Sequence[Entry], step: int) -> int:
    """An entry of this step that read inputs."""
    return next(n for n, e in enumerate(entries) if e.step == step and e.inputs is not None)


def drop_one_sample(entries: Sequence[Entry]) -> list[Entry]:
    at = reader(entries, 1)
    read = entries[at].inputs
    assert read is not None
    (start, stop), *rest = read.rows
    less = Read(group=read.group, rows=((start + 1, stop), *rest), samples=read.samples[1:])
    return changed(entries, at, inputs=less)


def swap_in_a_sample_of_before(entries: Sequence[Entry]) -> list[Entry]:
    before, at = entries[reader(entries, 0)].inputs, reader(entries, 1)
    read = entries[at].inputs
    assert before is not None and read is not None
    return changed(
        entries, at, inputs=read.model_copy(update={"samples": (before.samples[0], *read.samples[1:])})
    )


def train_a_row_twice(entries: Sequence[Entry]) -> list[Entry]:
    at = reader(entries, 2)
    read, whole = entries[at].inputs, entries[at].batch
    assert read is not None
    return changed(
        entries,
        at,
        inputs=Read(group=read.group, rows=((0, whole),), samples=tuple(range(1000, 1000 + whole))),
    )


def change_one_weight(entries: Sequence[Entry]) -> list[Entry]:
    at = next(n for n, e in enumerate(entries) if e.digests and any(
        set(e.digests) & set(o.digests) for o in entries if o is not e and o.step == e.step
    ))  # fmt: skip
    others = [o for o in entries if o.step == entries[at].step and o is not entries[at]]
    number = next(k for k in entries[at].digests if any(k in o.digests for o in others))
    return changed(entries, at, digests={**entries[at].digests, number: "0" * 16})


def repeat_a_step(entries: Sequence[Entry]) -> list[Entry]:
    return [*entries, entries[-1]]


def skip_a_step(entries: Sequence[Entry]) -> list[Entry]:
    return [e for e in entries if e.step != 2]


def one_device_skips_a_step(entries: Sequence[Entry]) -> list[Entry]:
    return [e for e in entries if (e.step, e.device) != (2, entries[0].device)]


def stop_early(entries: Sequence[Entry]) -> list[Entry]:
    return [e for e in entries if e.step < STEPS - 1]


def another_loss(entries: Sequence[Entry]) -> list[Entry]:
    loss = float.fromhex(entries[-1].loss)
    return changed(entries, len(entries) - 1, loss=(loss * (1 + 2**-50)).hex())


def another_plan(entries: Sequence[Entry]) -> list[Entry]:
    return changed(entries, 0, plan="def")


def another_run(entries: Sequence[Entry]) -> list[Entry]:
    return changed(entries, 0, run="other")


def another_devices_row(entries: Sequence[Entry]) -> list[Entry]:
    return changed(entries, 0, stray=((3, 4),))


BUGS: dict[Callable[[Sequence[Entry]], list[Entry]], str] = {
    drop_one_sample: "step 1, inputs: nobody read row",
    swap_in_a_sample_of_before: "was trained on before, in step 0 of the same epoch",
    train_a_row_twice: "step 2, inputs: ",
    change_one_weight: "of the weights differs between",
    repeat_a_step: f"step {STEPS - 1} follows step {STEPS - 1}",
    skip_a_step: "step 2 is committed by nobody",
    one_device_skips_a_step: "step 2: only",
    stop_early: f"step {STEPS - 1} is committed by nobody",
    another_loss: f"step {STEPS - 1}: loss is",
    another_plan: "step 0: plan is",
    another_run: "several runs: other, test",
    another_devices_row: "read rows that are not its own: row 3",
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_the_checker_finds(history: list[Entry], bug: Callable[[Sequence[Entry]], list[Entry]]) -> None:
    problems = check_history(bug(history), STEPS)
    assert any(BUGS[bug] in problem for problem in problems), problems


def test_a_line_torn_by_the_workers_death_is_no_line(
    history: list[Entry], pool: Pool, tmp_path: Path
) -> None:
    pool.train(NAMED_PLANS["single device"]("fp32"), STEPS, held_out_rows=0, history=settings(tmp_path))
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    entries, problems = read_history(tmp_path)
    assert problems == []
    assert [e.step for e in entries] == [*range(STEPS - 1)]
    assert check_history(entries, STEPS - 1) == []


def test_a_whole_line_that_is_no_entry_is_told(tmp_path: Path) -> None:
    history_file(tmp_path, "a/0/0").write_text('{"run": "x"}\nnot json\n')
    entries, problems = read_history(tmp_path)
    assert entries == []
    assert [problem.split(": no entry")[0] for problem in problems] == ["a-0-0.jsonl:1", "a-0-0.jsonl:2"]


def test_steps_that_a_later_attempt_does_again_count_once(history: list[Entry]) -> None:
    """The first attempt dies in step 3, the second goes on from step 2."""
    first = [e for e in history if e.step < 3 or (e.step == 3 and e.device == history[0].device)]
    second = [e.model_copy(update={"attempt": 2}) for e in history if e.step >= 2]
    assert check_history([*first, *second], STEPS) == []
    lost = [e for e in second if e.step >= 3]
    assert any(
        "step 2 is committed" in p for p in check_history([*stop_early(skip_a_step(first)), *lost], STEPS)
    )
