"""When messages were sent and steps ended, for those who account for their waits while the run goes on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hethub.files import whole_file

__all__ = ["Moments"]


class Moments:
    """A file of modelled seconds that all workers of a run map: of each message of a step when it was sent last and how
    long the plan predicts it to take, of each device when it ended this step and the one before.

    Nobody can be two steps ahead of another, since every step's norm needs everyone: two places a device suffice, and a
    message is not sent again before its receiver had it.
    """

    def __init__(self, file: Path, messages: int, devices: int) -> None:
        shape = (2 * messages + 2 * devices,)
        # A view as a plain array, whose single numbers are read and written several times as fast.
        numbers = np.memmap(file, dtype=np.float64, mode="r+", shape=shape).view(np.ndarray)
        self._sent = numbers[:messages]
        self.predicted_seconds = numbers[messages : 2 * messages]
        self._ended = numbers[2 * messages :].reshape(2, devices)

    @staticmethod
    def create(file: Path, predicted_seconds: npt.NDArray[np.float64], devices: int) -> None:
        """Make the file for messages that are predicted to take so long; nothing has been sent, no step has ended."""
        nothing = np.full(len(predicted_seconds), math.nan)
        with whole_file(file) as temporary:  # a worker of the attempt before may still map the old one
            np.concatenate((nothing, predicted_seconds, np.zeros(2 * devices))).tofile(temporary)

    def send(self, message: int, now: float) -> None:
        """Called before a message leaves."""
        self._sent[message] = now

    def sent(self, message: int) -> float:
        """When the sender sent a message that has just been received; NaN if it did not say."""
        return float(self._sent[message])

    def end(self, step: int, device: int, now: float) -> None:
        """Called when a device's step has ended."""
        self._ended[step % 2, device] = now

    def ended(self, step: int) -> float:
        """When a step ended everywhere; 0 before the first. May be asked when the step after it has ended here."""
        return float(self._ended[step % 2].max())
