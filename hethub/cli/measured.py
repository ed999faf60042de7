"""The options `--profiles` and `--calibration`: what predictions of our own plans rest on beside catalog figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # numpy is loaded when a command runs
    from hethub.cost.measured import Measured
    from hethub.cost.profiles.profile import Profile
    from hethub.specs.cluster import Cluster
    from hethub.specs.workload import Workload

__all__ = ["CalibrationOption", "ProfilesOption", "StrictOption", "read_measured"]

ProfilesOption = Annotated[
    Path | None,
    typer.Option(help="Folder with layers.csv and transfers.csv: layers take what was measured there."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Refuse a device type whose layers the profiles lack.")
]
CalibrationOption = Annotated[
    Path | None, typer.Option(help="A file that `hethub calibrate` wrote from our own runs.")
]


def read_measured(
    cluster: Cluster, workload: Workload, profiles: Path | None, calibration: Path | None, *, strict: bool
) -> Measured:
    """What the files say of this cluster; tells what they lack, or refuses a lacking profile with `strict`.

    Raises InputError, also for a calibration that was made beside a profile and is used without one, or the reverse.
    """
    from hethub.cost.measured import NOT_MEASURED, Measured, spread_interval
    from hethub.errors import InputError

    if profiles is None and calibration is None:
        return NOT_MEASURED
    profile = None if profiles is None else _profile(profiles, cluster, workload, strict=strict)
    if calibration is None:
        assert profile is not None
        spread = profile.spread(workload.model.name, cluster.device_types)
        return Measured(profile, {}, None if spread is None else spread_interval(spread))
    from hethub.simulate.validation import load_calibration

    found = load_calibration(calibration)
    if found.profiled != (profile is not None):
        how = "beside --profiles" if found.profiled else "without --profiles"
        raise InputError(f"{calibration}: was made {how}. Use it the same way, or calibrate again.")
    slow_down = found.coefficients.slow_down
    lacking = [name for name in cluster.device_types if name not in slow_down]
    if lacking:
        typer.echo(f"{calibration} has nothing on {', '.join(lacking)}: taken as their figures say", err=True)
    return Measured(profile, slow_down, found.ratio_interval)


def _profile(folder: Path, cluster: Cluster, workload: Workload, *, strict: bool) -> Profile:
    from hethub.cost.profiles.profile import LayerKey, load_profile
    from hethub.errors import InputError

    profile = load_profile(folder)

    def known(kind: str, name: str) -> bool:
        sizes = workload.sequence_length, workload.precision
        return bool(profile.rows(LayerKey(workload.model.name, name, kind, 1, *sizes)))

    kinds = ("embedding", "decoder", "head")
    lacking = [
        f"{kind} on {name}" for name in cluster.device_types for kind in kinds if not known(kind, name)
    ]
    if lacking:
        words = f"{folder} has no {', '.join(lacking)} of {workload.model.name}"
        if strict:
            raise InputError(f"{words}. Measure it with `hethub profile measure`, or leave out --strict.")
        typer.echo(f"{words}: a roofline stands in", err=True)
    return profile
