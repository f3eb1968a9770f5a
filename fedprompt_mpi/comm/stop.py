"""A request to stop before the time is up: batch systems send a signal ahead of a job's time limit.

SIGUSR1 sets a mark, on whichever rank; nothing is interrupted. Rank 0's next broadcast tells everybody, so that all
leave between the same two rounds, with a checkpoint. A mark on another rank is ignored: launchers and srun send the
signal to all of them.
"""

import signal
from types import FrameType


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """All ranks left after a checkpoint, as they were asked to; raised on every rank."""


_requested = False


def listen() -> None:
    """Take SIGUSR1 for a request to stop, from now on."""
    signal.signal(signal.SIGUSR1, _note)


def is_requested() -> bool:
    """Tell whether this process has been asked to stop."""
    return _requested


def _note(number: int, frame: FrameType | None) -> None:
    global _requested
    _requested = True
