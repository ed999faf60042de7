"""The few errors of HetHub, by what the caller does next.

HetHubError
  InputError        exit 2: fix the file
  InfeasibleError   exit 3: relax the job or add devices
  MachineError exit 4: mend the machine (missing package, port, address)
  RunError          exit 1: the run failed; the text names rank, device and action
    HeadLostError   exit 1 by the launcher, which knows it by the driver's own exit code

Each message is one line: where, what is wrong, what to do.
"""

from __future__ import annotations

__all__ = [
    "HeadLostError",
    "HetHubError",
    "InfeasibleError",
    "InputError",
    "MachineError",
    "RunError",
    "not_installed",
    "printable",
]


class HetHubError(Exception):
    """An error whose text is written for the person at the command line."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[type[HetHubError], tuple[str]]:
        return (type(self), (self.message,))


class InputError(HetHubError):
    """A file or an argument is wrong; `message` starts with `file:line:column key`."""

    exit_code = 2


class InfeasibleError(HetHubError):
    """No plan fits; `message` says what is short, by how much, and the smallest change that fits."""

    exit_code = 3


class MachineError(HetHubError):
    """The machine lacks something: a package, an address, a port."""

    exit_code = 4


class RunError(HetHubError):
    """A run failed; `message` names rank, device, action and reason."""

    exit_code = 1


class HeadLostError(RunError):
    """The head of the Ray cluster is gone; the launcher decides what comes next."""

    exit_code = 70


def not_installed(package: str, user: str, extra: str) -> MachineError:
    """The error of whoever needs a package of an extra that is not there."""
    return MachineError(
        f"{package}: not installed, {user} needs it. Install the extra: pip install 'hethub[{extra}]'."
    )


def printable(text: str) -> str:
    """A text out of a file as a line of a message may hold it: line breaks, controls and marks that turn the direction
    of writing are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
