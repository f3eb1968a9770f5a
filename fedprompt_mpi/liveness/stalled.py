"""Stalled-rank detection: a rank that waits too long asks its neighbours, and ends the job if the wait cannot end.

A rank that is stopped, or stuck where no Python runs, does not answer. Ranks that wait or train answer with the
collective in which they wait. If two ranks wait in different collectives, neither can continue.

Each rank asks the log2(R) ranks that are 1, 2, 4, ... behind it in a ring. So a rank that does not answer is missed by
log2(R) others, and if all ranks wait, but not in one collective, two that are next to each other notice.
"""

import socket
import time
from typing import Any

import numpy as np

from fedprompt_mpi.liveness.liveness import Liveness

CALL, ANSWER = 1, 2
_ANSWER = np.dtype([("call", "<i8"), ("collective", "<i8"), ("name", "S24")])
NOT_WAITING = -1
"""In place of a collective's number: this rank waits for none, or for one that not all ranks are in."""
LOOK_EVERY_S = 0.25
STAGGER_S = 0.5
"""Between the moments at which two ranks call the others missing, so that one of them reports."""


class StalledRanks:
    """One rank's part in the detection."""

    def __init__(self, mpi: Any, comm: Any, liveness: Liveness) -> None:
        """Start.

        Args:
            mpi: mpi4py's module.
            comm: a communicator for nothing else.
            liveness: of this process; it has the deadline.
        """
        self._mpi, self.comm, self._liveness = mpi, comm, liveness
        self.patience_s = liveness.deadline_s / 2
        """Seconds of waiting after which a rank asks the others, and asks again."""
        # a rank that is stuck may report itself after the deadline, which is before this
        self._answer_within_s = liveness.deadline_s + 5.0 + STAGGER_S * comm.rank
        self._next_look = 0.0
        self._number = 0
        self._called_at: float | None = None
        self._next_call_s = self.patience_s
        self._answers: dict[int, tuple[int, str]] = {}
        self._elsewhere_before: tuple[Any, dict[int, tuple[int, str]]] = (None, {})
        self._under_way: list[tuple[Any, np.ndarray]] = []

    def answer(self) -> None:
        """Answer the ranks that have asked."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_EVERY_S
        for asking, call in self._arrived(CALL):
            number, name = self._liveness.collective or (NOT_WAITING, "")
            self._send(asking, ANSWER, (call["call"], number, name.encode()))

    def wait(self, waited_s: float) -> None:
        """Look after the others while waiting for them.

        Args:
            waited_s: duration of this wait so far.

        Raises:
            StalledError: in a library call, if a rank does not answer or waits in another collective.
        """
        self.answer()
        others = behind(self.comm.rank, self.comm.size)
        if waited_s < self.patience_s:
            self._called_at, self._next_call_s = None, self.patience_s
        elif self._called_at is None:
            if waited_s >= self._next_call_s:
                self._call(others)
        else:
            self._answers |= {
                rank: (int(answer["collective"]), answer["name"].decode())
                for rank, answer in self._arrived(ANSWER)
                if answer["call"] == self._number
            }
            missing = sorted(others - set(self._answers))
            if not missing:
                self._called_at, self._next_call_s = None, waited_s + self.patience_s
                self._compare()
            elif self._liveness.clock() - self._called_at > self._answer_within_s:
                names = " and ".join(f"rank {rank}" for rank in missing)
                here = f"rank {self.comm.rank} on {socket.gethostname()}"
                self._liveness.stalled(
                    f"no sign of life from {names} for more than {self._liveness.deadline_s:g} s (comm.deadline_s): "
                    f"{here} has been waiting in phase {self._liveness.phase} of round {self._liveness.round}"
                )

    def _call(self, others: set[int]) -> None:
        self._number += 1
        self._called_at, self._answers = self._liveness.clock(), {}
        for rank in others:
            self._send(rank, CALL, (self._number, NOT_WAITING, b""))

    def _compare(self) -> None:
        """End the job if ranks wait in different collectives, and did so at the last call.

        A rank that has just not noticed the end of the collective before answers with that one, once.
        """
        own = self._liveness.collective
        waiting = {rank: at for rank, at in self._answers.items() if at[0] != NOT_WAITING}
        elsewhere = {rank: at for rank, at in waiting.items() if at != own}
        if own is not None and own[0] == NOT_WAITING:
            own = None
        if elsewhere and self._elsewhere_before == (own, elsewhere) and own is not None:
            places = {self.comm.rank: own, **waiting}
            told = ", ".join(f"rank {rank} in {name} ({number})" for rank, (number, name) in sorted(places.items()))
            self._liveness.stalled(
                f"ranks wait for each other in different collectives: {told}; round {self._liveness.round}"
            )
        self._elsewhere_before = own, elsewhere

    def close(self) -> None:
        """Free the communicator."""
        for request, _ in self._under_way:
            request.Cancel()
        self.comm.Free()

    def _send(self, rank: int, tag: int, content: tuple[Any, ...]) -> None:
        message = np.array([content], dtype=_ANSWER)
        self._under_way = [pair for pair in self._under_way if not pair[0].Test()]
        self._under_way.append((self.comm.Isend(message.view(np.uint8), dest=rank, tag=tag), message))

    def _arrived(self, tag: int) -> list[tuple[int, np.void]]:
        """Return the messages with a tag that have arrived, each with the rank that sent it."""
        arrived, status = [], self._mpi.Status()
        while self.comm.Iprobe(tag=tag, status=status):
            message = np.empty(1, dtype=_ANSWER)
            self.comm.Recv(message.view(np.uint8), source=status.Get_source(), tag=tag)
            arrived.append((status.Get_source(), message[0]))
        return arrived


def behind(rank: int, size: int) -> set[int]:
    """Return the ranks that a rank asks, which are 1, 2, 4, ... behind it in a ring of so many ranks."""
    return {(rank + (1 << bit)) % size for bit in range((size - 1).bit_length())}
