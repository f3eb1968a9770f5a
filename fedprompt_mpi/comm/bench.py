"""The time of vectors on this network: raw mpi4py collectives and this program's channel, side by side in one job.

A raw repetition is a barrier, the clock, the collective, the clock. A repetition of the channel is a whole call in
measure mode: `transfer` is the collective that carries the vector, `call` is everything, with the small collective
that is polled until all ranks have arrived, the barrier, and packing. Raw and channel take turns; a repetition counts
with its slowest rank, and the medians are compared.

Legend: R ranks, K = R - 1 clients, one on each worker; n bytes of one vector.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from fedprompt_mpi.comm.chunks import chunks_of
from fedprompt_mpi.comm.mpi_channel import MPIChannel
from fedprompt_mpi.comm.statistics import quantiles
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One collective at one size; seconds are medians of a repetition's slowest rank."""

    collective: str
    bytes: int
    """n."""
    repetitions: int
    raw: dict[str, float | None] | None
    """Of the raw collective, as `statistics.quantiles` has it; None if it was left out."""
    transfer: dict[str, float | None]
    call: dict[str, float | None]

    @property
    def ratio(self) -> float | None:
        """Our transfer in units of the raw collective's time."""
        return None if self.raw is None else _median(self.transfer) / _median(self.raw)


def _median(figures: Mapping[str, float | None]) -> float:
    median = figures["median"]
    assert median is not None
    return median


def sizes_up_to(largest: int, more: Iterable[int] = ()) -> list[int]:
    """Return the sizes in bytes, ascending multiples of 4: from 1 kB by `STEP`, the largest, and what else is asked."""
    sizes, size = {largest, *more}, SMALLEST_BYTES
    while size < largest:
        sizes.add(size)
        size *= STEP
    return sorted({4 * max(1, round(size / 4)) for size in sizes})


class Bench:
    """The measurement; every rank calls the same methods."""

    def __init__(self, world: Any, liveness: Liveness, *, seconds: float) -> None:
        """Open a channel in measure mode beside the raw communicator.

        Args:
            world: an mpi4py communicator of at least two ranks.
            liveness: of this process.
            seconds: approximate time for each size and collective.
        """
        from mpi4py import MPI

        self._mpi, self._raw_comm, self._seconds = MPI, world, seconds
        self.channel = MPIChannel(world, liveness, measure=True)

    def measure(self, collective: str, size: int) -> BenchRow:
        """Measure one collective at one size (n bytes); the row is complete on every rank."""
        raw, ours = self.calls(collective, size // 4)
        for call in (raw, ours):  # connections, buffers, pages
            if call is not None:
                call()
        self.channel.phases.timing.take()
        first = self._one(raw, ours)
        self._raw_comm.Allreduce(self._mpi.IN_PLACE, first, op=self._mpi.MAX)  # all take as many repetitions
        repetitions = int(np.clip(self._seconds / first.sum(), FEWEST, MOST))
        mine = np.stack([self._one(raw, ours) for _ in range(repetitions)])
        slowest = np.empty_like(mine)
        self._raw_comm.Allreduce(mine, slowest, op=self._mpi.MAX)
        raw_s, transfer, call = (quantiles(column.tolist()) for column in slowest.T)
        return BenchRow(
            collective=collective,
            bytes=size,
            repetitions=repetitions,
            raw=None if raw is None else raw_s,
            transfer=transfer,
            call=call,
        )

    def _one(self, raw: Callable[[], Any] | None, ours: Callable[[], Any]) -> np.ndarray:
        """Return seconds of the raw collective, our transfer and our whole call `[3]`, on this rank."""
        clock, seconds = self._mpi.Wtime, np.zeros(3)
        if raw is not None:
            self._raw_comm.Barrier()
            start = clock()
            raw()
            seconds[0] = clock() - start
        self._raw_comm.Barrier()
        start = clock()
        ours()
        seconds[2] = clock() - start
        records = self.channel.phases.timing.take()
        transfers = np.isin(records["phase"], [PHASES.index(phase) for phase in TRANSFERS])
        seconds[1] = records["seconds"][transfers].sum()
        return seconds

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
        headers = np.zeros(len(rows), dtype=HEADER)
        if collective == "gather":
            raw = None
            if 4 * length * clients <= MOST_RAW_BYTES:
                received = [self._buffer(clients, length), counts * length, mpi.FLOAT] if root else None
                raw = lambda: comm.Gatherv(rows, received, root=0)  # noqa: E731

            def gather() -> None:
                channel.share(headers, counts)
                for _ in channel.gather(rows, counts):
                    pass

            return raw, gather
        total = np.ones(length, dtype=np.float32) if root else None
        factors = np.full(len(rows), 1 / clients)

        def reduce() -> None:
            channel.share(headers, counts)
            for _ in channel.reduce(rows, factors, 2.0**-29):
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Seconds of a transfer = latency + bytes / bandwidth: the alpha-beta model.

    References:
        Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, IJHPCA 2005,
        Section 3.
    """

    latency_s: float
    """alpha."""
    seconds_per_byte: float
    """beta."""
    worst: float
    """Largest relative error of the model at a measured size."""

    def seconds(self, size: int) -> float:
        """Return the model's seconds for a vector of n bytes."""
        return self.latency_s + self.seconds_per_byte * size


def fit(sizes: Iterable[int], seconds: Iterable[float]) -> Fit:
    """Fit the model with the least relative errors: small vectors count as much as large ones; neither is negative."""
    n, t = np.asarray(list(sizes), dtype=np.float64), np.asarray(list(seconds), dtype=np.float64)
    terms = np.stack([np.ones_like(n), n])
    candidates = [np.linalg.lstsq((terms / t).T, np.ones_like(t), rcond=None)[0]]
    for only in (0, 1):  # the bounds, where the best of both would be negative
        share = terms[only] / t
        candidates.append(np.where(np.arange(2) == only, share.sum() / (share @ share), 0.0))
    errors = [np.abs(c @ terms / t - 1) if (c >= 0).all() else np.full_like(t, np.inf) for c in candidates]
    best = int(np.argmin([error @ error for error in errors]))
    latency, per_byte = candidates[best].tolist()
    return Fit(latency_s=latency, seconds_per_byte=per_byte, worst=float(errors[best].max()))
