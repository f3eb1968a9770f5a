"""Where the time went: seconds and bytes of each phase, per round and rank.

Every duration is local, taken from one rank's clock; two hosts' clocks are never subtracted.

wait              until the last rank is there (asleep)
sync              measure mode alone: the barriers between waiting and a collective
broadcast         the collective that carries the global vector, all ranks present
gather, reduce    the collective that carries the updates, all ranks present
pack              from what was trained to what is sent (attack, noise, error feedback), into and out of the format on
                  the wire, and into contiguous memory
copy              to and from the GPU
train, aggregate, evaluate, evaluate_clients, checkpoint
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from fedprompt_mpi.comm.last_seen import HERE

PHASES = (
    "wait", "sync", "broadcast", "gather", "reduce", "pack", "copy", "train", "aggregate", "evaluate",
    "evaluate_clients", "checkpoint",
)  # fmt: skip
TRANSFERS = ("broadcast", "gather", "reduce")
"""The phases in which vectors travel."""
RECORD = np.dtype([("round", "<i4"), ("phase", "<i4"), ("seconds", "<f8"), ("bytes", "<i8")])


def is_done(round_: int, phase: str, done: int) -> bool:
    """Tell whether a record stays when a run goes on after round `done`, whose vector is evaluated anew."""
    return round_ < done or (round_ == done and phase != "evaluate")


@dataclasses.dataclass(slots=True)
class Timing:
    """The records of this rank."""

    round_: int = 0
    clock: Callable[[], float] = time.perf_counter
    """Seconds, of this process alone."""
    muted: bool = False
    """Whether what happens now belongs to no round, so that nothing is recorded."""
    to_first_broadcast_s: float | None = None
    """From the start of the run until the first global vector had reached this rank."""
    received: int = 0
    """How many times rank 0 has received what all handed over; right on rank 0."""
    _records: list[tuple[int, int, float, int]] = dataclasses.field(default_factory=list)
    _last_handed_over: list[tuple[int, int, float, int]] = dataclasses.field(default_factory=list)
    _handed_over: int = 0
    _sums: dict[tuple[int, str], float] = dataclasses.field(default_factory=dict)

    def add(self, phase: str, seconds: float, payload_bytes: int = 0) -> None:
        """Record a finished phase of the current round."""
        if not self.muted:
            self._records.append((self.round_, PHASES.index(phase), seconds, payload_bytes))
            self._sums[self.round_, phase] = self.seconds(phase, self.round_) + seconds

    @contextlib.contextmanager
    def phase(self, phase: str, payload_bytes: int = 0) -> Iterator[None]:
        """Record how long the block takes."""
        HERE.enter(phase, self.round_)
        start = self.clock()
        yield
        self.add(phase, self.clock() - start, payload_bytes)

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        """Record nothing of the block: it belongs to no round."""
        self.muted = True
        try:
            yield
        finally:
            self.muted = False

    def forget_after(self, done: int) -> None:
        """Forget what a run that goes on after round `done` does anew."""
        self._records = [r for r in self._records if is_done(r[0], PHASES[r[1]], done)]
        self._sums = {key: s for key, s in self._sums.items() if is_done(key[0], key[1], done)}

    def take_back(self, received: int) -> None:
        """Take back the records that were handed over last, if rank 0 has not received them.

        Args:
            received: how many times rank 0 has received what all handed over.
        """
        if self._handed_over > received:
            self._records = self._last_handed_over + self._records
        self._handed_over = self.received = received

    def seconds(self, phase: str, round_: int) -> float:
        """Return this rank's seconds of a phase in one round."""
        return self._sums.get((round_, phase), 0.0)

    def take(self) -> np.ndarray:
        """Return the records `[n]` of dtype `RECORD`, and forget them, unless they have to be taken back."""
        records = np.array(self._records, dtype=RECORD)
        self._last_handed_over, self._records = self._records, []
        self._handed_over += 1
        self._sums = {
            key: s for key, s in self._sums.items() if key[0] >= self.round_ - 1
        }  # nobody asks for older ones
        return records
