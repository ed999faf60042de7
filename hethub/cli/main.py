"""The `hethub` command. Commands import what they need when they run, so that each starts quickly."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from hethub import __version__
from hethub.cli.bound import bound
from hethub.cli.calibrate import calibrate
from hethub.cli.checkpoint import app as checkpoint_app
from hethub.cli.compare import compare
from hethub.cli.dashboards import dashboards
from hethub.cli.data import app as data_app
from hethub.cli.diff import diff
from hethub.cli.launch import launch
from hethub.cli.logs import logs
from hethub.cli.plan import plan
from hethub.cli.profile import app as profile_app
from hethub.cli.replan import replan
from hethub.cli.report import report
from hethub.cli.runs import runs, status, stop
from hethub.cli.schema import schema
from hethub.cli.simulate import simulate
from hethub.cli.timeline import timeline
from hethub.cli.top import top
from hethub.cli.validate import validate
from hethub.errors import HetHubError, printable
from hethub.interruption import listen, terminated

__all__ = ["app", "main", "run"]

_PREEMPTED = 75  # exit code: asked to stop by SIGTERM
_INTERRUPTED = 130  # the shell's convention for Ctrl-C

app = typer.Typer(
    name="hethub",
    help="Plan, predict and run the training of one model on unlike accelerators.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(plan)
app.command()(simulate)
app.command()(bound)
app.command()(diff)
app.command()(compare)
app.command()(launch)
app.command()(runs)
app.command()(status)
app.command()(logs)
app.command()(stop)
app.command()(top)
app.command()(timeline)
app.command()(report)
app.command()(replan)
app.command()(validate)
app.command()(calibrate)
app.command()(dashboards)
app.command()(schema)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(profile_app, name="profile")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hethub {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point of the console script."""
    run(launcher=True)


def run(*, launcher: bool = False) -> None:
    """Run a command and turn errors into one line and an exit code (see `hethub.errors`).

    With `launcher` this process may become one that outlives the driver (`hethub.launch.launcher`).
    """
    listen()
    try:
        app(obj=launcher)
    except HetHubError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        for line in error.message.splitlines():  # one line per problem
            sys.stderr.write(f"hethub: {printable(line)}\n")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:
        # Typer turns a KeyboardInterrupt into an exit.
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        sys.stderr.write("hethub: stopped by SIGTERM\n" if terminated() else "hethub: interrupted\n")
        sys.exit(_PREEMPTED if terminated() else _INTERRUPTED)
    except BrokenPipeError:
        sys.exit(0)
