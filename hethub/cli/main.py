"""The `hethub` command. Commands are imported when they are asked for, and import what they need when they run, so that
each starts quickly."""

from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from hethub import __version__
from hethub.errors import HetHubError, MachineError, printable
from hethub.interruption import listen, terminated

__all__ = ["app", "main", "run"]

_PREEMPTED = 75  # exit code: asked to stop by SIGTERM
_INTERRUPTED = 130  # the shell's convention for Ctrl-C
# disk full, quota, read-only, a device that fails, too many open files: no bugs of ours where no command says better
_MACHINE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)

# name: module of `hethub.cli`, and what the command is there; in the order of `hethub --help`
_COMMANDS = {
    "plan": ("plan", "plan"),
    "simulate": ("simulate", "simulate"),
    "bound": ("bound", "bound"),
    "diff": ("diff", "diff"),
    "compare": ("compare", "compare"),
    "launch": ("launch", "launch"),
    "runs": ("runs", "runs"),
    "status": ("runs", "status"),
    "logs": ("logs", "logs"),
    "stop": ("runs", "stop"),
    "top": ("top", "top"),
    "timeline": ("timeline", "timeline"),
    "report": ("report", "report"),
    "replan": ("replan", "replan"),
    "validate": ("validate", "validate"),
    "calibrate": ("calibrate", "calibrate"),
    "dashboards": ("dashboards", "dashboards"),
    "schema": ("schema", "schema"),
    "data": ("data", "app"),
    "checkpoint": ("checkpoint", "app"),
    "profile": ("profile", "app"),
}


class _Commands(TyperGroup):
    """Loads only the command that is asked for: all of them together take as long as a small plan."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # an unknown name is told with the nearest of all
        for name in [cmd_name] if cmd_name in _COMMANDS else _COMMANDS:
            if name not in self.commands:
                self.add_command(_load(name), name)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # Who reads the output has had enough. Typer would make it a failure, which it is only where it ends a run.
            if ctx.invoked_subcommand == "launch" or not _unread(sys.stdout.fileno()):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
            sys.exit(0)


def _unread(descriptor: int) -> bool:
    """Whether nobody reads a pipe any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return bool(poll.poll(0))


def _load(name: str) -> Any:
    module, attribute = _COMMANDS[name]
    found = getattr(import_module(f"hethub.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        group = typer.main.get_group(found)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False)
    alone.command(name)(found)
    return typer.main.get_command(alone)


app = typer.Typer(
    name="hethub",
    cls=_Commands,
    help="Plan, predict and run the training of one model on unlike accelerators.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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
        _fail(error)
    except OSError as error:
        if error.errno not in _MACHINE_FAULTS:
            raise
        what = error.filename or "the output, or a file,"
        _fail(
            MachineError(f"{what} cannot be read or written ({error.strerror}). Mend that, and run it again.")
        )
    except (KeyboardInterrupt, SystemExit) as end:
        # Typer turns a KeyboardInterrupt into an exit.
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        sys.stderr.write("hethub: stopped by SIGTERM\n" if terminated() else "hethub: interrupted\n")
        sys.exit(_PREEMPTED if terminated() else _INTERRUPTED)


def _fail(error: HetHubError) -> NoReturn:
    """Tell of an error, one line per problem, and end."""
    if "--debug" in sys.argv:
        traceback.print_exc()
    for line in error.message.splitlines():
        sys.stderr.write(f"hethub: {printable(line)}\n")
    sys.exit(error.exit_code)
