"""Seconds and bytes of each phase, by round and rank.

Every duration comes from the clock of one rank; the clocks of two hosts are never subtracted.

wait              until the last rank has arrived (asleep)
sync              measure mode only: the barriers between waiting and a collective
broadcast         the collective that carries the global vector, all ranks present
gather, reduce    the collective that carries the updates, all ranks present
keys, shares      secure aggregation: the clients' keys and shares of their secrets, made, sent and checked
mask              the update in whole numbers, and the masks on it
unmask            the shares that take the masks off the sum, and taking them off
pack              attack, noise and error feedback; encoding and decoding; copies into contiguous memory
residuals         the collective that carries the clients' residuals of a short wire format to the checkpoint
copy              to and from the GPU
audit             the attacks of an audit
filter            the gradients of examples, and the collective that carries their centroids
train, aggregate, evaluate, evaluate_clients, checkpoint
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import numpy as np

from fedprompt_mpi.liveness.liveness import Liveness

SECURE = ("keys", "shares", "mask", "unmask")
"""The phases that secure aggregation adds."""
PHASES = (
    "wait", "sync", "broadcast", "gather", "reduce", "pack", "copy", "train", "aggregate", "evaluate",
    "evaluate_clients", "checkpoint", "residuals", "filter", "audit", *SECURE,
)  # fmt: skip
TRANSFERS = ("broadcast", "gather", "reduce")
"""The phases in which vectors travel."""
RECORD = np.dtype([("round", "<i4"), ("phase", "<i4"), ("seconds", "<f8"), ("bytes", "<i8")])


def is_done(round_: int, phase: str, done: int) -> bool:
    """Return True if a record is kept when a run continues after round `done`, whose vector is evaluated again."""
    return round_ < done or (round_ == done and phase != "evaluate")


@dataclasses.dataclass(slots=True)
class Timing:
    """The records of this rank."""

    round: int = 0
    """The round to which a phase belongs unless it says otherwise."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds, of this process alone."""
    muted: bool = False
    """True while nothing is recorded: what happens belongs to no round."""
    received: int = 0
    """How often rank 0 has received the records of all ranks; valid on rank 0."""
    _records: list[tuple[int, int, float, int]] = dataclasses.field(default_factory=list)
    _last_handed_over: list[tuple[int, int, float, int]] = dataclasses.field(default_factory=list)
    _handed_over: int = 0
    _sums: dict[tuple[int, str], float] = dataclasses.field(default_factory=dict)

    def add(self, phase: str, seconds: float, payload_bytes: int = 0, round_: int | None = None) -> None:
        """Record a finished phase."""
        if not self.muted:
            round_ = self.round if round_ is None else round_
            self._records.append((round_, PHASES.index(phase), seconds, payload_bytes))
            self._sums[round_, phase] = self.seconds(phase, round_) + seconds

    @contextlib.contextmanager
    def time(self, phase: str, round_: int | None = None) -> Iterator[None]:
        """Record how long the block takes."""
        start = self.clock()
        yield
        self.add(phase, self.clock() - start, round_=round_)

    @contextlib.contextmanager
    def mute(self) -> Iterator[None]:
        """Record nothing of the block: it belongs to no round."""
        self.muted = True
        try:
            yield
        finally:
            self.muted = False

    def forget_after(self, done: int) -> None:
        """Forget the records of rounds that are repeated when a run continues after round `done`."""
        self._records = [r for r in self._records if is_done(r[0], PHASES[r[1]], done)]
        self._sums = {key: s for key, s in self._sums.items() if is_done(key[0], key[1], done)}

    def take_back(self, received: int) -> None:
        """Take back the records that were handed over last, if rank 0 has not received them.

        Args:
            received: how often rank 0 has received the records of all ranks.
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
        recent = self.round - 1  # older sums are not asked for
        self._sums = {key: s for key, s in self._sums.items() if key[0] >= recent}
        return records


@dataclasses.dataclass(frozen=True, slots=True)
class Phases:
    """The phases of this rank: each is timed, and reported to the liveness when it begins."""

    timing: Timing
    liveness: Liveness

    @contextlib.contextmanager
    def time(self, phase: str, round_: int | None = None) -> Iterator[None]:
        """Enter a phase and record how long the block takes; only the watched thread calls this."""
        self.liveness.enter(phase, self.timing.round if round_ is None else round_)
        with self.timing.time(phase, round_):
            yield
