"""The folder of a run's checkpoints: a folder a step, complete or absent.

    checkpoints/step-00000040/            manifest, a-0-0.state, ...
    checkpoints/step-00000045.attempt-2/  being written; no checkpoint
    checkpoints/damaged-.../              set aside, kept for whoever wants to know why

Writers sync their files into the attempt's folder. The manifest comes last; then the folder is synced, renamed, and the
rename synced. So whatever is cut off, and wherever, a folder called step-N has all of its files or a manifest that says
which bytes are not theirs.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hethub.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    Manifest,
    encode_manifest,
    read_manifest,
)
from hethub.checkpoints.state_file import StateFile

__all__ = ["CHECKPOINTS", "Listed", "Store", "open_checkpoint", "verify_checkpoint"]

CHECKPOINTS = "checkpoints"  # of the run folder
_STEP = re.compile(r"step-([0-9]{8,12})")
_PARTIAL = re.compile(r"step-[0-9]{8,12}\.attempt-[0-9]+")


@dataclass(frozen=True, slots=True)
class Listed:
    """A folder called step-N: its manifest, or why it is no checkpoint."""

    path: Path
    step: int
    manifest: Manifest | None
    problem: str


class Store:
    """The checkpoints of one run. Everything but reading is for the one driver that holds the run."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's `checkpoints`; it need not be there yet."""
        self.folder = folder

    def partial(self, step: int, attempt: int) -> Path:
        """Where the writers of an attempt put the files of a step."""
        return self.folder / f"step-{step:08d}.attempt-{attempt}"

    def listed(self) -> list[Listed]:
        """All folders called step-N, newest first."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            match = _STEP.fullmatch(path.name)
            if match:
                try:
                    found.append(Listed(path, int(match[1]), open_checkpoint(path), ""))
                except CheckpointError as error:
                    found.append(Listed(path, int(match[1]), None, error.message))
        return sorted(found, key=lambda one: -one.step)

    def commit(self, manifest: Manifest) -> Path:
        """Make the attempt's folder of a step, whose files are there and synced, a checkpoint. Raises OSError."""
        source = self.partial(manifest.step, manifest.attempt)
        target = self.folder / f"step-{manifest.step:08d}"
        if target.exists():
            raise FileExistsError(17, "there is a checkpoint of this step already", str(target))
        descriptor = os.open(source / MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            content = memoryview(encode_manifest(manifest))
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_folder(source)
        os.rename(source, target)
        _sync_folder(self.folder)
        return target

    def prune(self, keep: int) -> None:
        """Remove all but the newest `keep` checkpoints. Raises OSError."""
        intact = [one for one in self.listed() if one.manifest is not None]
        for old in intact[keep:]:
            (old.path / MANIFEST).unlink()  # first: what is half removed is no checkpoint
            shutil.rmtree(old.path)

    def drop_partial(self, step: int, attempt: int) -> None:
        """Remove what writers left of a step that became no checkpoint."""
        shutil.rmtree(self.partial(step, attempt), ignore_errors=True)

    def clean(self) -> None:
        """Remove what dead writers left."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _PARTIAL.fullmatch(path.name):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def set_aside(self, path: Path) -> Path:
        """Give a damaged checkpoint's folder a name that is none, so that its step can be saved again."""
        for number in range(1, 1000):
            target = path.with_name(f"damaged-{number}-{path.name}")
            if not target.exists():
                path.rename(target)
                return target
        raise CheckpointError(f"{path}: too many damaged checkpoints beside it. Remove them.")


def open_checkpoint(path: Path) -> Manifest:
    """The manifest of a checkpoint's folder whose files are there, in their sizes. Raises CheckpointError.

    Whether every byte is right is found by reading: `StateFile` or `verify_checkpoint`.
    """
    manifest = read_manifest(path / MANIFEST)
    match = _STEP.fullmatch(path.name)
    if match and int(match[1]) != manifest.step:
        raise CheckpointError(f"{path}: its manifest is of step {manifest.step}.")
    for file in manifest.files:
        with StateFile(path, manifest, file):
            pass
    return manifest


def verify_checkpoint(path: Path) -> Manifest:
    """Read every byte of a checkpoint. Raises CheckpointError naming the file and where it is damaged."""
    manifest = open_checkpoint(path)
    for spec in manifest.files:
        with StateFile(path, manifest, spec) as file:
            file.verify()
    return manifest


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
