"""A request to stop before the time is up: from a batch system ahead of a job's time limit, or by Ctrl-C.

SIGUSR1, SIGTERM and the first SIGINT set a mark; nothing is interrupted. Launchers pass signals on to all ranks, or to
some: a rank that trains gives the round up, or finishes it where it may not, and tells all with the headers of its
updates; rank 0 tells all with its next broadcast. So all leave together, after a round that is done
and saved.
"""

import signal
from types import FrameType


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """All ranks left after a checkpoint, as they were asked to; raised on every rank."""


STOPPED = 75
"""Exit status of a run that was asked to stop, and can be resumed: EX_TEMPFAIL of sysexits.h."""
_requested = False


def listen() -> None:
    """Take the signals for a request to stop, from now on; a second SIGINT is a KeyboardInterrupt again."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def request() -> None:
    """Note that another process has been asked to stop."""
    global _requested
    _requested = True


def is_requested() -> bool:
    """Tell whether this process has been asked to stop."""
    return _requested


def _note(number: int, frame: FrameType | None) -> None:
    request()
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)
