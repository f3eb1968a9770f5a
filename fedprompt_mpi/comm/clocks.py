"""The ranks' clocks against rank 0's, and starts of all ranks at an agreed time.

After a barrier ranks go on one after the other: the skew. Of a small collective that is a part of its time. Ranks of
one node read one clock; those of other nodes are compared with it by the quickest of many exchanges. The clock is the
system's monotonic one: MPI_Wtime may begin anew in each process (Open MPI 5), so that ranks of one node disagree.

References:
    Worsch, Reussner and Augustin, On Benchmarking Collective MPI Operations, EuroPVM/MPI 2002 (starts in windows);
    Hunold and Carpen-Amarie, On the Impact of Synchronizing Clocks and Processes on Benchmarking MPI Collectives,
    EuroMPI 2015.
"""

import os
import time
from typing import Any

import numpy as np

EXCHANGES = 100
TRIALS = 50
LEAST_S = 5e-5
"""Time from the agreement to the start at least, after which no rank should still be on its way."""
LATE_S = 5e-6
"""A rank that starts so much after the agreed time has missed it."""


def clock_offset(comm: Any, nodes: np.ndarray) -> float:
    """Return this rank's clock minus rank 0's, in seconds; 0 on rank 0's node. Every rank calls this.

    Of the exchanges with a rank the one of the shortest round trip counts; the offset is wrong by half of that at most.

    Args:
        comm: a communicator.
        nodes: `[R]` int64, the node of each rank.
    """
    here, there, offset = np.zeros(1), np.zeros(1), np.zeros(1)
    for rank in np.flatnonzero(nodes != nodes[0]).tolist():
        if comm.rank == 0:
            trips = []
            for _ in range(EXCHANGES):
                sent = time.perf_counter()
                comm.Send(here, dest=rank)
                comm.Recv(there, source=rank)
                received = time.perf_counter()
                trips.append((received - sent, float(there[0]) - (sent + received) / 2))
            offset[0] = min(trips)[1]
            comm.Send(offset, dest=rank)
        elif comm.rank == rank:
            for _ in range(EXCHANGES):
                comm.Recv(here, source=0)
                there[0] = time.perf_counter()
                comm.Send(there, dest=0)
            comm.Recv(offset, source=0)
    return 0.0 if comm.rank == 0 else float(offset[0])


class Window:
    """Lets all ranks start at a time that rank 0 names."""

    def __init__(self, mpi: Any, comm: Any, offset: float) -> None:
        """Measure how long rank 0's word takes to reach every rank; every rank calls this.

        Args:
            mpi: mpi4py's module.
            comm: a communicator.
            offset: of this rank's clock, from `clock_offset`.
        """
        self._comm, self._offset, self._ahead_s = comm, offset, 0.0
        self.is_late = False
        """True if this rank has missed the last start."""
        took = np.zeros(TRIALS)
        for trial in range(TRIALS):
            comm.Barrier()  # else rank 0 would run ahead
            took[trial] = time.perf_counter() - self.wait()
        comm.Allreduce(mpi.IN_PLACE, took, op=mpi.MAX)
        self._ahead_s = max(LEAST_S, 2 * float(np.quantile(took, 0.9)))

    def wait(self) -> float:
        """Wait for the next start, and return its time on this rank's clock."""
        agreed = np.array([time.perf_counter() + self._ahead_s])
        self._comm.Bcast(agreed, root=0)
        start = float(agreed[0]) + self._offset
        while (now := time.perf_counter()) < start:
            if start - now > LATE_S:
                os.sched_yield()
        self.is_late = now > start + LATE_S
        return start
