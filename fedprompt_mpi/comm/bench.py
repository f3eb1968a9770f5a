"""The time of vectors on this network: raw mpi4py collectives and this program's channel, side by side in one job.

A raw repetition is two barriers, the clock, the collective, the clock. A repetition of the channel is a whole call in
measure mode: `transfer` is the collective that carries the vector, after two barriers as well, `call` is everything,
with the small collective that is polled until all ranks have arrived, and packing. Raw and channel take turns; a
repetition counts with its slowest rank, and the medians are compared. With `sync="window"` ranks do not start after the
second barrier but at an agreed time, and what one of them has missed does not count (see `clocks`).

Legend: R ranks, K = R - 1 clients, one on each worker; n bytes of one vector.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from fedprompt_mpi.comm.chunks import chunks_of
from fedprompt_mpi.comm.clocks import Window, clock_offset
from fedprompt_mpi.comm.exact_sum import words_of
from fedprompt_mpi.comm.mpi_channel import MPIChannel
from fedprompt_mpi.comm.statistics import Quantiles, quantiles
from fedprompt_mpi.comm.timing import PHASES, TRANSFERS
from fedprompt_mpi.liveness.liveness import Liveness

HEADER = np.dtype("V46")
"""As large as the header of an update."""

SMALLEST_BYTES = 1024
STEP = 4
"""From one size to the next."""
FEWEST, MOST = 7, 301
"""Repetitions."""
MOST_RAW_BYTES = 2**31
"""Raw gathers of more bytes at rank 0 are left out; the channel gathers in chunks."""
COLLECTIVES = ("broadcast", "gather", "reduce")
Sync = Literal["barrier", "window"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One collective at one size; seconds are quantiles over repetitions, each with its slowest rank."""

    collective: str
    bytes: int
    """n."""
    repetitions: int
    missed: int
    """Repetitions whose agreed start a rank has missed; they do not count, unless too few would be left."""
    raw: Quantiles | None
    """Of the raw collective; None if it was left out."""
    transfer: Quantiles
    call: Quantiles
    raw_skew: Quantiles | None
    """From the first rank's start to the last one's."""
    skew: Quantiles
    autocorrelation: float
    """Of a repetition's transfer with the next one's: above 0 they tell less than as many independent ones would."""

    @property
    def ratio(self) -> float | None:
        """Our transfer in units of the raw collective's time."""
        return None if self.raw is None else self.transfer.median / self.raw.median

    def to_json(self) -> dict[str, Any]:
        """Return the row as bench.json has it."""
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def sizes_up_to(largest: int, more: Iterable[int] = ()) -> list[int]:
    """Return the sizes in bytes, ascending multiples of 4: from 1 kB by `STEP`, the largest, and what else is asked."""
    sizes, size = {largest, *more}, SMALLEST_BYTES
    while size < largest:
        sizes.add(size)
        size *= STEP
    return sorted({4 * max(1, round(size / 4)) for size in sizes})


def autocorrelation(samples: np.ndarray) -> float:
    """Return the correlation of n samples with those that follow them; 0 if they do not vary."""
    centred = samples - samples.mean()
    square = float(centred @ centred)
    return float(centred[:-1] @ centred[1:]) / square if square > 0 else 0.0


class Bench:
    """The measurement; every rank calls the same methods."""

    def __init__(self, world: Any, liveness: Liveness, *, seconds: float, sync: Sync = "barrier") -> None:
        """Open a channel in measure mode beside the raw communicator.

        Args:
            world: an mpi4py communicator of at least two ranks.
            liveness: of this process.
            seconds: approximate time for each size and collective.
            sync: how ranks start together.
        """
        from mpi4py import MPI

        self._mpi, self._raw_comm, self._seconds = MPI, world, seconds
        self.channel = MPIChannel(world, liveness, measure=True)
        self._offset = clock_offset(world, self.channel.placement.nodes)
        self._window = Window(MPI, world, self._offset) if sync == "window" else None
        if self._window is not None:
            self.channel.start_together = self._window.wait

    def measure(self, collective: str, size: int) -> BenchRow:
        """Measure one collective at one size (n bytes); the row is complete on every rank."""
        raw, ours = self.calls(collective, size // 4)
        for call in (raw, ours):  # connections, buffers, pages
            if call is not None:
                call()
        self.channel.phases.timing.take()
        first = self._one(raw, ours)
        self._raw_comm.Allreduce(self._mpi.IN_PLACE, first, op=self._mpi.MAX)  # all take as many repetitions
        repetitions = int(np.clip(self._seconds / first[:3].sum(), FEWEST, MOST))
        mine = np.stack([self._one(raw, ours) for _ in range(repetitions)])
        slowest, earliest = np.empty_like(mine), np.empty_like(mine)
        self._raw_comm.Allreduce(mine, slowest, op=self._mpi.MAX)
        self._raw_comm.Allreduce(mine, earliest, op=self._mpi.MIN)
        in_time = slowest[:, 5] == 0
        if in_time.sum() < FEWEST:  # a window is of no use here: say so, and let all count
            in_time[:] = True
        raw_s, transfer, call = (quantiles(column.tolist()) for column in slowest[in_time, :3].T)
        raw_skew, skew = (quantiles(column.tolist()) for column in (slowest - earliest)[in_time, 3:5].T)
        return BenchRow(
            collective=collective,
            bytes=size,
            repetitions=int(in_time.sum()),
            missed=int((slowest[:, 5] > 0).sum()),
            raw=None if raw is None else raw_s,
            transfer=transfer,
            call=call,
            raw_skew=None if raw is None else raw_skew,
            skew=skew,
            autocorrelation=autocorrelation(slowest[in_time, 1]),
        )

    def _one(self, raw: Callable[[], Any] | None, ours: Callable[[], Any]) -> np.ndarray:
        """Return six figures of this rank.

        They are seconds of the raw collective, of our transfer and of our whole call; the starts of the first two, on
        rank 0's clock; and how many of these the rank has missed.
        """
        clock, seconds = time.perf_counter, np.zeros(6)
        if raw is not None:
            self._raw_comm.Barrier()
            start = self.channel.start_together()
            raw()
            seconds[0], seconds[3] = clock() - start, start - self._offset
            seconds[5] += self.missed
        self._raw_comm.Barrier()
        start = clock()
        ours()
        seconds[2], seconds[4] = clock() - start, self.channel.started - self._offset
        seconds[5] += self.missed
        records = self.channel.phases.timing.take()
        transfers = np.isin(records["phase"], [PHASES.index(phase) for phase in TRANSFERS])
        seconds[1] = records["seconds"][transfers].sum()
        return seconds

    @property
    def missed(self) -> bool:
        """True if this rank has missed the last agreed start."""
        return self._window is not None and self._window.is_late

    def calls(self, collective: str, length: int) -> tuple[Callable[[], Any] | None, Callable[[], Any]]:
        """Return the raw call and ours, for a vector of so many numbers."""
        comm, channel, mpi = self._raw_comm, self.channel, self._mpi
        vector = np.ones(length, dtype=np.float32)
        if collective == "broadcast":
            header = np.zeros(4, dtype=np.int64)

            def broadcast() -> None:
                channel.tell(header)
                channel.broadcast(vector)

            return lambda: comm.Bcast(vector, root=0), broadcast
        root, clients = comm.rank == 0, comm.size - 1
        counts = np.array([0, *[1] * clients])
        rows = vector[None] if not root else np.empty((0, length), dtype=np.float32)
        headers, verdict = np.zeros(len(rows), dtype=HEADER), np.zeros(4, dtype=np.int64)
        if collective == "gather":
            raw = None
            if 4 * length * clients <= MOST_RAW_BYTES:
                received = [self._buffer(clients, length), counts * length, mpi.FLOAT] if root else None
                raw = lambda: comm.Gatherv(rows, received, root=0)  # noqa: E731

            def gather() -> None:
                channel.consult(headers, counts, lambda _: 0, verdict)
                for _ in channel.gather(rows, counts):
                    pass

            return raw, gather
        total = np.ones(length, dtype=np.float32) if root else None
        factors = np.full(len(rows), 1 / clients)

        def reduce() -> None:
            channel.consult(headers, counts, lambda _: 0, verdict)
            for _ in channel.reduce(words_of(rows, factors, 2.0**-29), length):
                pass

        return lambda: comm.Reduce(vector, total, op=mpi.SUM, root=0), reduce

    def _buffer(self, clients: int, length: int) -> np.ndarray:
        """Return the buffer `[K, length]` in which a raw gather receives.

        It is the channel's own buffer where the vector travels in one chunk: the place in memory changes the time of
        either by up to 30 %.
        """
        if len(chunks_of(clients, length)) == 1:
            return self.channel.buffer(0, clients, length, np.float32)
        return np.ones((clients, length), dtype=np.float32)
