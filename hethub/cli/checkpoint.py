"""`hethub checkpoint`: what a run has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # loaded when the command runs, not when `hethub --help` lists it
    from hethub.checkpoints.store import Listed

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="The run folder.")]
Step = Annotated[
    int | None, typer.Option(help="The checkpoint after so many steps; the newest intact one if left out.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.callback()
def checkpoint() -> None:
    """List, verify and export the checkpoints of a run."""


@app.command("list")
def list_(run: Run, as_json: Json = False) -> None:
    """List a run's checkpoints, newest first, with what is wrong with those that are none.

    Example: hethub checkpoint list runs/demo
    """
    listed = [_as_object(one) for one in _listed(run)]
    if as_json:
        typer.echo(json.dumps({"run": str(run), "checkpoints": listed}, indent=2))
        return
    for one in listed:
        words = one["problem"] or f"{one['bytes']:,} bytes in {one['files']} files, attempt {one['attempt']}"
        typer.echo(f"step {one['step']}\t{words}")


@app.command()
def verify(run: Run, step: Step = None, as_json: Json = False) -> None:
    """Read every byte of a run's checkpoints (or of one), and fail where one is not what was written.

    Example: hethub checkpoint verify runs/demo
    """
    from hethub.checkpoints.manifest import CheckpointError
    from hethub.checkpoints.store import verify_checkpoint

    found, problems = [], []
    for one in _listed(run) if step is None else [_chosen(run, step)]:
        try:
            manifest = verify_checkpoint(one.path)
            found.append({"step": one.step, "bytes": manifest.saved_bytes, "problem": ""})
        except CheckpointError as error:
            found.append({"step": one.step, "bytes": None, "problem": error.message})
            problems.append(error.message)
    if as_json:
        typer.echo(json.dumps({"run": str(run), "checkpoints": found}, indent=2))
    else:
        for entry in found:
            if not entry["problem"]:
                typer.echo(f"step {entry['step']}\tintact, {entry['bytes']:,} bytes")
    if problems:
        raise CheckpointError("\n".join(problems))


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option(help="Folder to write, in Hugging Face's form.")],
    step: Step = None,
    as_json: Json = False,
) -> None:
    """Write the weights of a checkpoint as a Hugging Face Llama folder: config.json and model.safetensors.

    Example: hethub checkpoint export runs/demo --output llama
    """
    from hethub.checkpoints.export import export_checkpoint

    one = _chosen(run, step)
    manifest = export_checkpoint(one.path, output)
    if as_json:
        typer.echo(
            json.dumps({"step": one.step, "output": str(output), "parameters": len(manifest.parameters)})
        )
    else:
        typer.echo(f"step {one.step}: {len(manifest.parameters)} tensors in {output}")


def _listed(run: Path) -> list[Listed]:
    from hethub.checkpoints.store import CHECKPOINTS, Store
    from hethub.errors import InputError

    found = Store(run / CHECKPOINTS).listed()
    if not found:
        raise InputError(f"{run}: holds no checkpoint. Give the folder of a run whose job has `checkpoint`.")
    return found


def _chosen(run: Path, step: int | None) -> Listed:
    from hethub.errors import InputError

    found = _listed(run)
    if step is None:
        chosen = next((one for one in found if one.manifest is not None), None)
    else:
        chosen = next((one for one in found if one.step == step), None)
    if chosen is None:
        steps = ", ".join(str(one.step) for one in found)
        raise InputError(
            f"{run}: no checkpoint of step {step or 'any'} to use. There are folders of steps {steps}."
        )
    return chosen


def _as_object(one: Listed) -> dict[str, Any]:
    manifest = one.manifest
    return {
        "step": one.step,
        "problem": one.problem,
        "bytes": None if manifest is None else manifest.saved_bytes,
        "files": None if manifest is None else len(manifest.files),
        "attempt": None if manifest is None else manifest.attempt,
        "path": str(one.path),
    }
