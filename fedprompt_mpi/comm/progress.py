"""How far the ranks are in a round's local steps, for a bar that rank 0 shows; nothing is sent if nobody watches."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

TAG = 7
REPORT_EVERY_S = 0.2


class Progress:
    """One rank's part in it."""

    def __init__(self, comm: Any) -> None:
        """Start; `comm` is a communicator for nothing else."""
        self.comm = comm
        self.show: Callable[[int], None] | None = None
        """On rank 0: shows how many steps the rank that is last has behind it; None if nobody watches."""
        self.is_watched = False
        """Whether rank 0 shows what it is told."""
        self._left = np.zeros(comm.size, dtype=np.int64)
        self._steps = 0
        self._sending: tuple[Any, np.ndarray] | None = None
        self._last_report = 0.0

    def watch(self, show: Callable[[int], None] | None, steps: np.ndarray) -> None:
        """Begin a round of `[R]` steps."""
        self.show, self._steps = show, int(steps.max())
        self._left[:] = steps

    def report(self, left: int) -> None:
        """Tell rank 0 how many steps are left, a few times a second at most."""
        if self.comm.rank == 0:  # a server that trains; nobody needs to send for it
            self._left[0] = left
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
        """On rank 0: take what has come, and show it."""
        if self.show is None:
            return
        from mpi4py import MPI

        status, message = MPI.Status(), np.empty(1, dtype=np.int64)
        while self.comm.Iprobe(tag=TAG, status=status):
            self.comm.Recv(message, source=status.Get_source(), tag=TAG)
            self._left[status.Get_source()] = message[0]
        self.show(self._steps - int(self._left.max()))

    def close(self) -> None:
        """Let go of the communicator."""
        if self._sending is not None:
            self._sending[0].Cancel()
        self.comm.Free()
