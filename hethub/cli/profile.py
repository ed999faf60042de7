"""`hethub profile`: measured layer, collective and link times."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Measured layer, collective and link times.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keeps `import` a command of its own while it is the only one."""


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
