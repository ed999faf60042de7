"""What RUNS of `hethub calibrate` and `hethub validate` may name: our run folders and folders of imported runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hethub.errors import InputError

if TYPE_CHECKING:  # numpy is loaded when a command runs
    from hethub.cost.profiles.profile import Profile
    from hethub.simulate.imported_runs import MeasuredRun
    from hethub.simulate.validation import OwnRun

__all__ = ["Sources", "load_sources"]

_OURS, _IMPORTED = "measured.npz", "measured_runs.json"


@dataclass(frozen=True, slots=True)
class Sources:
    """Our own runs, and imported ones with the profile that prices them."""

    own: tuple[OwnRun, ...]
    imported: tuple[MeasuredRun, ...]
    profile: Profile | None


def load_sources(folders: Sequence[Path], profiles: Path | None) -> Sources:
    """Read every folder: one of ours, a folder of such, or one with measured_runs.json (and, where `profiles` is not
    given, the tables to import a profile from). Raises InputError naming the folder."""
    from hethub.cost.profiles.artifact import import_artifact
    from hethub.cost.profiles.profile import load_profile
    from hethub.simulate.imported_runs import load_runs
    from hethub.simulate.validation import load_own_run

    own: list[OwnRun] = []
    imported: list[MeasuredRun] = []
    profile = None if profiles is None else load_profile(profiles)
    for folder in folders:
        inside = [folder, *sorted(p for p in folder.glob("*") if p.is_dir())] if folder.is_dir() else []
        ours = [path for path in inside if (path / _OURS).is_file()]
        own.extend(load_own_run(path) for path in ours)
        if (folder / _IMPORTED).is_file():
            imported.extend(load_runs(folder / _IMPORTED))
            profile = profile or import_artifact(folder)
        elif not ours:
            raise InputError(
                f"{folder}: holds no run ({_OURS}) and no imported ones ({_IMPORTED}). Name a run's folder."
            )
    return Sources(tuple(own), tuple(imported), profile)
