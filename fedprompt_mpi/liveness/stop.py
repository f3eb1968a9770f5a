"""A request to stop before the run is done: from a batch system ahead of the time limit, or by Ctrl-C.

SIGUSR1, SIGTERM, SIGHUP and the first SIGINT set a flag; nothing is interrupted. A launcher passes a signal on to all
ranks or to some. A rank that is training gives the round up, or finishes it where it must, and tells the others with
the headers of its updates. Rank 0 tells all ranks with its next broadcast. So all ranks stop after the same
saved round.
"""

import signal
from types import FrameType

STOPPED = 75
"""Exit status of a run that was stopped on request and can be resumed: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """All ranks stopped on request, after a checkpoint; raised on every rank."""


def requests() -> list[signal.Signals]:
    """Return the signals that ask to stop; SIGHUP, of a closed terminal, not under nohup, which ignores it."""
    numbers = [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    return [n for n in numbers if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class StopRequest:
    """The flag of one process."""

    def __init__(self) -> None:
        """Start without a request."""
        self.requested = False

    def request(self) -> None:
        """Set the flag: this or another process was asked to stop."""
        self.requested = True

    def listen(self) -> None:
        """Take the signals for a request to stop from now on; a second SIGINT is a KeyboardInterrupt."""
        for number in requests():
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
