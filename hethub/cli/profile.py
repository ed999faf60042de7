"""`hethub profile`: measured layer, collective and link times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Measured layer, collective and link times.", no_args_is_help=True)


@app.command("import")
def import_(
    data: Annotated[
        Path, typer.Argument(help="Folder with layer_profiles.csv, link_bandwidth.csv and others.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder for layers.csv and transfers.csv.")],
) -> None:
    """Take published measurements (the tables of Sailor's artifact) into our profile format.

    Example: hethub profile import ../data profiles/sailor
    """
    from hethub.cost.profiles.artifact import import_artifact
    from hethub.cost.profiles.profile import save_profile

    profile = import_artifact(data)
    save_profile(profile, output)
    typer.echo(f"{len(profile.layers)} layer times and {len(profile.transfers)} transfers in {output}")


@app.command()
def measure(
    cluster: Annotated[Path, typer.Argument(help="The cluster file whose workload's layers are measured.")],
    output: Annotated[
        Path, typer.Argument(help="Folder for layers.csv and transfers.csv; gone on with if there.")
    ],
    device_type: Annotated[str, typer.Option(help="The device type of the cluster that this machine has.")],
    rows: Annotated[str, typer.Option(help="Sequences of a micro-batch to measure at.")] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(min=0, help="For each row of the tables.")] = 1.0,
    link: Annotated[
        str | None, typer.Option(help="Measure messages inside this host too, as this link class.")
    ] = None,
) -> None:
    """Measure a device here and now: layers, a product, a copy, messages. Prints how repeatable each figure was.

    Example: hethub profile measure cluster.yaml profiles/here --device-type fast
    """
    from hethub.errors import InputError, not_installed
    from hethub.specs.cluster import load_problem

    loaded, workload = load_problem(cluster)
    if device_type not in loaded.device_types:
        known = ", ".join(loaded.device_types)
        raise InputError(f"--device-type {device_type}: {cluster} has {known}. Name one of them.")
    counts = _counts(rows)
    try:
        from hethub.launch.measuring import measure_device
    except ModuleNotFoundError as error:
        raise not_installed(str(error.name), "measuring", "launch") from None

    measure_device(loaded.device_types[device_type], workload, counts, output, seconds, link, typer.echo)


def _counts(text: str) -> list[int]:
    from hethub.errors import InputError

    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise InputError(
            f'--rows "{text}": not whole numbers above 0 with commas between. Write, say, 1,2,4,8.'
        )
    return counts
