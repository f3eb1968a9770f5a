"""Who is missing: asked by ranks that have waited too long, answered by all that are alive.

A rank that is stopped, or stuck where no Python runs, cannot say so itself (one that can, does: see `faults.Watchdog`).
Ranks that wait, and ranks that train, look now and then whether somebody asks; whoever does not answer is missing.
"""

import socket
import time
from typing import Any

import numpy as np

from fedprompt_mpi.comm.faults import speak_for_all
from fedprompt_mpi.comm.last_seen import HERE

CALL, ANSWER = 1, 2
LOOK_EVERY_S = 0.25
STAGGER_S = 0.5
"""Between one rank's asking and the next one's, so that one of them speaks for all."""


class RollCall:
    """One rank's part in it."""

    def __init__(self, comm: Any, deadline_s: float) -> None:
        """Start.

        Args:
            comm: an mpi4py communicator for nothing else.
            deadline_s: how long a rank may be without progress.
        """
        self.comm, self._deadline_s = comm, deadline_s
        self.patience_s = deadline_s / 2
        """After so long a wait it calls. Who has not answered a deadline later has made no step in that time."""
        self._answer_within_s = deadline_s + 5.0 + STAGGER_S * comm.rank  # the missing one may speak for itself before
        self._next_look = 0.0
        self._number = 0
        self._called_at: float | None = None
        self._answered: set[int] = set()
        self._under_way: list[tuple[Any, np.ndarray]] = []

    def answer(self) -> None:
        """Answer whoever has asked."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY_S
        for asking, number in self._arrived(CALL):
            self._send(asking, ANSWER, number)

    def wait(self, waited_s: float) -> None:
        """Look after the others while waiting for them: call, and end the job if somebody does not answer.

        Args:
            waited_s: how long this wait has been.
        """
        self.answer()
        others = set(range(self.comm.size)) - {self.comm.rank}
        if waited_s < self.patience_s:
            self._called_at = None
        elif self._called_at is None:
            self._number += 1
            self._called_at, self._answered = time.monotonic(), set()
            for rank in others:
                self._send(rank, CALL, self._number)
        else:
            self._answered.update(rank for rank, number in self._arrived(ANSWER) if number == self._number)
            missing = sorted(others - self._answered)
            if not missing:
                self._called_at = None  # and call again
            elif time.monotonic() - self._called_at > self._answer_within_s:
                names = " and ".join(f"rank {rank}" for rank in missing)
                here = f"rank {self.comm.rank} on {socket.gethostname()}"
                speak_for_all(
                    f"fedprompt_mpi: no sign of life from {names} for more than {self._deadline_s:g} s "
                    f"(comm.deadline_s): {here} has been waiting in phase {HERE.phase} of round {HERE.round_}"
                )

    def close(self) -> None:
        """Let go of the communicator."""
        for request, _ in self._under_way:
            request.Cancel()
        self.comm.Free()

    def _send(self, rank: int, tag: int, number: int) -> None:
        message = np.array([number], dtype=np.int64)
        self._under_way = [pair for pair in self._under_way if not pair[0].Test()]
        self._under_way.append((self.comm.Isend(message, dest=rank, tag=tag), message))

    def _arrived(self, tag: int) -> list[tuple[int, int]]:
        """Return what has come with a tag: who sent it, and the number of the call."""
        from mpi4py import MPI

        arrived, message, status = [], np.empty(1, dtype=np.int64), MPI.Status()
        while self.comm.Iprobe(tag=tag, status=status):
            self.comm.Recv(message, source=status.Get_source(), tag=tag)
            arrived.append((status.Get_source(), int(message[0])))
        return arrived
