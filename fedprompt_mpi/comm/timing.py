"""Where the time went: seconds and bytes of each phase, per round and rank.

Every duration is local, taken from one rank's clock; two hosts' clocks are never subtracted.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

PHASES = ("wait", "broadcast", "gather", "train", "aggregate", "evaluate", "evaluate_clients")
RECORD = np.dtype([("round", "<i4"), ("phase", "<i4"), ("seconds", "<f8"), ("bytes", "<i8")])


@dataclasses.dataclass(slots=True)
class Timing:
    """The records of this rank."""

    round_: int = 0
    _records: list[tuple[int, int, float, int]] = dataclasses.field(default_factory=list)
    _sums: dict[tuple[int, str], float] = dataclasses.field(default_factory=dict)

    def add(self, phase: str, seconds: float, payload_bytes: int = 0) -> None:
        """Record a finished phase of the current round."""
        self._records.append((self.round_, PHASES.index(phase), seconds, payload_bytes))
        self._sums[self.round_, phase] = self.seconds(phase, self.round_) + seconds

    @contextlib.contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """Record how long the block takes."""
        start = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - start)

    def seconds(self, phase: str, round_: int) -> float:
        """Return this rank's seconds of a phase in one round."""
        return self._sums.get((round_, phase), 0.0)

    def take(self) -> np.ndarray:
        """Hand over the records `[n]` of dtype `RECORD`, and forget them."""
        records = np.array(self._records, dtype=RECORD)
        self._records.clear()
        return records
