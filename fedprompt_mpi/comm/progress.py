"""What is going on, for the screen that rank 0 has; local steps of the slowest rank are sent only if it has a bar."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

TAG = 7
REPORT_EVERY_S = 0.2


class Screen(Protocol):
    """What shows lines and progress."""

    @property
    def has_bar(self) -> bool:
        """True if progress is shown."""
        ...

    def say(self, text: str) -> None:
        """Print lines."""

    def stage(self, what: str, total: float = 0, *, quiet: bool = False) -> None:
        """Say what begins now, and how much of it there is, if that is known; quiet: for a bar alone."""

    def advance(self, done: float, note: str = "") -> None:
        """Say how much of it is done."""


class Progress:
    """One rank's part in it."""

    def __init__(self, mpi: Any = None, comm: Any = None) -> None:
        """Start.

        Args:
            mpi: mpi4py's module; None in a job of one process.
            comm: a communicator for nothing else.
        """
        self._mpi, self.comm = mpi, comm
        self.show: Callable[[int], None] | None = None
        """On rank 0: shows how many steps the slowest rank has done; None if no bar is shown."""
        self.screen: Screen | None = None
        """On rank 0: shows what is going on."""
        self.is_watched = False
        """True if rank 0 shows the steps."""
        self._is_root = comm is None or comm.rank == 0
        self._left = np.zeros(1 if comm is None else comm.size, dtype=np.int64)
        self._steps = 0
        self._sending: tuple[Any, np.ndarray] | None = None
        self._last_report = 0.0

    def stage(self, what: str, total: float = 0) -> None:
        """Say what begins now, such as "loading the model"; nothing on the other ranks."""
        if self.screen is not None:
            self.screen.stage(what, total)

    def advance(self, done: float) -> None:
        """Say how much of it is done."""
        if self.screen is not None:
            self.screen.advance(done)

    def watch(self, show: Callable[[int], None] | None, steps: np.ndarray) -> None:
        """Begin a round in which rank r takes `steps[r]` steps, `[R]` int64."""
        self.show, self._steps = show, int(steps.max())
        self._left[:] = steps

    def report(self, left: int) -> None:
        """Tell rank 0 how many steps of this rank are left, a few times a second at most."""
        if self._is_root:
            self._left[0] = left
            if self.comm is None and self.show is not None:
                self.show(self._steps - left)
            return
        now = time.monotonic()
        if not self.is_watched or now - self._last_report < REPORT_EVERY_S:
            return
        if self._sending is not None and not self._sending[0].Test():
            return
        message = np.array([left], dtype=np.int64)
        self._sending = (self.comm.Isend(message, dest=0, tag=TAG), message)
        self._last_report = now

    def receive(self) -> None:
        """Receive the reports that have arrived, and show them; on rank 0."""
        if self.show is None:
            return
        status, message = self._mpi.Status(), np.empty(1, dtype=np.int64)
        while self.comm.Iprobe(tag=TAG, status=status):
            self.comm.Recv(message, source=status.Get_source(), tag=TAG)
            self._left[status.Get_source()] = message[0]
        self.show(self._steps - int(self._left.max()))

    def close(self) -> None:
        """Free the communicator."""
        if self._sending is not None:
            self._sending[0].Cancel()
        self.comm.Free()
