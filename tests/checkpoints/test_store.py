"""A checkpoint is complete or absent, whatever cuts a save off; and no wrong byte is ever taken for a right one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench.damage import DAMAGES
from hethub.checkpoints import state_file, store
from hethub.checkpoints.manifest import CheckpointError, Manifest, encode_manifest, read_manifest
from hethub.checkpoints.reshard import Reader, needs
from hethub.checkpoints.state_file import block_bytes_for, write_state_file
from hethub.checkpoints.store import Store, open_checkpoint, verify_checkpoint
from tests.checkpoints.made import make_checkpoint, write_files
from tests.plan_strategies import compile_plan, six_plans

PLAN = six_plans()["unlike pipelines"]
PROGRAM = compile_plan(PLAN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of a run: steps 5 and 10."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (5, 10):
        make_checkpoint(folder, PLAN, PROGRAM, step, seed=step)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoints"))


def steps(folder: Path) -> list[int]:
    return [one.step for one in Store(folder).listed() if one.manifest is not None]


def test_a_checkpoint_is_found_verified_and_holds_three_numbers_an_element(folder: Path) -> None:
    assert steps(folder) == [10, 5]
    manifest = verify_checkpoint(folder / "step-00000010")
    assert manifest.state_bytes == 12 * sum(s.elements for s in PROGRAM.ownership.slices)
    assert manifest.saved_bytes <= 1.05 * manifest.state_bytes


def test_the_newest_stay(folder: Path) -> None:
    make_checkpoint(folder, PLAN, PROGRAM, 15)
    Store(folder).prune(2)
    assert steps(folder) == [15, 10]
    assert not (folder / "step-00000005").exists()


def test_a_step_is_saved_once_and_a_damaged_one_set_aside_can_be_saved_again(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        make_checkpoint(folder, PLAN, PROGRAM, 10)
    Store(folder).clean()
    aside = Store(folder).set_aside(folder / "step-00000010")
    assert aside.is_dir() and steps(folder) == [5]
    make_checkpoint(folder, PLAN, PROGRAM, 10)
    assert steps(folder) == [10, 5]


def test_what_dead_writers_left_is_no_checkpoint_and_is_removed(folder: Path) -> None:
    write_files(Store(folder), PLAN, PROGRAM, 15, attempt=3)
    (folder / "step-00000020.attempt-3").write_text("in the way")
    assert steps(folder) == [10, 5]
    Store(folder).clean()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000005", "step-00000010"]


# -- damage ----------------------------------------------------------------------------------------------------


def link_elsewhere(folder: Path, seed: random.Random) -> None:
    file = seed.choice(sorted(folder.glob("*.state")))
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


ALL_DAMAGES = [*DAMAGES, link_elsewhere]


def read_all(folder: Path) -> None:
    """As the devices of the plan read it."""
    manifest = open_checkpoint(folder)
    for device in PROGRAM.layout.used:
        with Reader(folder, manifest) as reader:
            for need in needs(PROGRAM, device):
                reader.read(need)


@pytest.mark.parametrize("damage", ALL_DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("seed", range(5))
def test_damage_is_found_by_whoever_reads(folder: Path, damage: Callable[..., None], seed: int) -> None:
    newest = folder / "step-00000010"
    damage(newest, random.Random(seed))
    with pytest.raises(CheckpointError):
        verify_checkpoint(newest)
    # Padding-free files: every byte is someone's, or a digest of theirs.
    with pytest.raises(CheckpointError):
        read_all(newest)
    verify_checkpoint(folder / "step-00000005")


@given(data=st.data())
@settings(max_examples=200)
def test_no_flipped_byte_of_a_manifest_is_read(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, data
) -> None:
    """Seen to catch: the digest line compared with nothing."""
    content = bytearray((whole / "step-00000010" / "manifest").read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("m") / "manifest"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_manifest(path)


@given(content=st.binary(max_size=300))
@settings(max_examples=200)
def test_no_bytes_make_a_manifest_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, content) -> None:
    path = tmp_path_factory.mktemp("m") / "manifest"
    for text in (content, b"hethub-checkpoint 1 " + content):
        path.write_bytes(text)
        with pytest.raises(CheckpointError):
            read_manifest(path)


CONTRADICTIONS: dict[str, Callable[[Manifest], Manifest]] = {
    "a slice is missing": lambda m: with_files(m, slices=m.files[0].slices[1:]),
    "a slice overlaps": lambda m: with_files(m, slices=(*m.files[0].slices, m.files[0].slices[0])),
    "a slice of no parameter": lambda m: with_files(m, slices=(*m.files[0].slices, (10**6, 0, 1))),
    "a negative slice": lambda m: with_files(m, slices=(*m.files[0].slices, (0, -1, 0))),
    "other bytes than slices": lambda m: with_files(m, bytes=m.files[0].bytes + 1),
    "a device twice": lambda m: m.model_copy(update={"files": (*m.files, m.files[0])}),
    "a shape of nothing": lambda m: m.model_copy(
        update={"parameters": (m.parameters[0].model_copy(update={"shape": (0, 4)}), *m.parameters[1:])}
    ),
    "a device that is a path": lambda m: with_files(m, device="../../etc/0/0"),
    "a block of no bytes": lambda m: with_files(m, block_bytes=0),
}


def with_files(manifest: Manifest, **changes: object) -> Manifest:
    first = manifest.files[0].model_copy(update=changes)
    return manifest.model_copy(update={"files": (first, *manifest.files[1:])})


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_at_odds_with_itself_is_refused_though_its_digest_is_right(
    whole: Path, tmp_path: Path, name
) -> None:
    manifest = CONTRADICTIONS[name](read_manifest(whole / "step-00000010" / "manifest"))
    (tmp_path / "manifest").write_bytes(encode_manifest(manifest))
    with pytest.raises(CheckpointError):
        read_manifest(tmp_path / "manifest")


def test_a_pickle_is_refused_and_never_run(whole: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payload = b"cos\nsystem\n(S'touch %b'\ntR." % str(marker).encode()
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoints")) / "step-00000010"
    for name in ("manifest", "a-0-0.state"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(payload)
        with pytest.raises(CheckpointError):
            read_all(folder)
        (folder / name).write_bytes(kept)
    assert not marker.exists()


# -- writing ---------------------------------------------------------------------------------------------------


class CutOffError(BaseException):
    """The machine lost power."""


class Disk:
    """Counts the file operations of a save and ends it at one. What was not synced by then is lost: a file's content
    where it has not been synced, a new name where its folder has not."""

    CALLS = ("open", "write", "fsync", "rename")

    def __init__(self, patch: pytest.MonkeyPatch, end: int) -> None:
        self.left = end
        self.dirty: dict[Path, None] = {}
        self.paths: dict[int, Path] = {}
        self.renames: list[tuple[Path, Path]] = []
        real = {name: getattr(os, name) for name in self.CALLS}
        self.real = real

        def opened(path, flags, mode=0o777):
            self.step()
            descriptor = real["open"](path, flags, mode)
            self.paths[descriptor] = Path(path)
            if flags & os.O_CREAT:
                self.dirty[Path(path)] = None
            return descriptor

        def written(descriptor, data):
            self.step()
            return real["write"](descriptor, data)

        def synced(descriptor):
            self.step()
            real["fsync"](descriptor)
            path = self.paths[descriptor]
            self.dirty.pop(path, None)
            self.renames = [(a, b) for a, b in self.renames if b.parent != path]

        def renamed(a, b):
            self.step()
            real["rename"](a, b)
            self.renames.append((Path(a), Path(b)))
            self.dirty = {Path(b) / p.relative_to(a) if p.is_relative_to(a) else p: None for p in self.dirty}

        for module in (state_file, store):
            for name, call in zip(self.CALLS, (opened, written, synced, renamed), strict=True):
                patch.setattr(module.os, name, call)

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise CutOffError

    def crash(self, keep_renames: bool) -> None:
        """Lose what was not synced."""
        for path in self.dirty:
            if path.exists():
                path.write_bytes(b"")
        for a, b in reversed(self.renames) if not keep_renames else ():
            if b.exists():
                self.real["rename"](b, a)


def saved_up_to(folder: Path, end: int, patch: pytest.MonkeyPatch, keep_renames: bool) -> bool:
    """Save step 15 and lose power after `end` operations; whether the save had returned."""
    with patch.context() as inner:
        disk = Disk(inner, end)
        try:
            make_checkpoint(folder, PLAN, PROGRAM, 15)
            done = True
        except CutOffError:
            done = False
    disk.crash(keep_renames)
    return done


@pytest.mark.parametrize("keep_renames", [True, False])
def test_a_save_cut_off_anywhere_leaves_a_whole_checkpoint_or_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_renames: bool
) -> None:
    """Seen to catch: the sync of the files, of the manifest, or of the folder after the rename left out; the manifest
    written before the rename of the folder but after it was synced."""
    for end in range(200):
        copy = Path(shutil.copytree(folder, tmp_path / f"copy-{end}"))
        done = saved_up_to(copy, end, monkeypatch, keep_renames)
        for one in Store(copy).listed():
            if one.manifest is not None:
                verify_checkpoint(one.path)
        assert [step for step in steps(copy) if step < 15] == [10, 5]
        if done:
            assert steps(copy) == [15, 10, 5]
            return
    raise AssertionError("the save did not end")


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the same error of the same call."""
    code = """
import resource, signal, sys
from pathlib import Path
from hethub.checkpoints.state_file import write_state_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_state_file(Path(sys.argv[1]), memoryview(bytes(50_000)), 4096)
except OSError as error:
    print("refused", error.errno)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.state")], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("refused ")
    assert not (tmp_path / "a.state").exists()


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 10**5])
def test_a_file_is_never_written_over(tmp_path: Path, size: int) -> None:
    block = block_bytes_for(size)
    write_state_file(tmp_path / "a.state", memoryview(bytes(size)), block)
    with pytest.raises(FileExistsError):
        write_state_file(tmp_path / "a.state", memoryview(bytes(size)), block)
