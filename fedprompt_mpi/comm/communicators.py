"""The communicators of an MPI job: duplicates for this program alone, and those of nodes."""

import time
from typing import Any

import numpy as np

from fedprompt_mpi.comm.placement import (
    MOST_PROCESSORS,
    MPILibrary,
    Placement,
    host_name,
    own_processors,
    share_of_cores,
)
from fedprompt_mpi.start.launcher import is_fault_tolerant, transport_of


class Communicators:
    """Duplicates of a communicator, so that no message of another library mixes with ours. Legend: R ranks."""

    def __init__(self, mpi: Any, world: Any) -> None:
        """Duplicate and split `world`; every rank of it calls this."""
        self.mpi, self.world = mpi, world
        self.comm, self.progress, self.stalled = world.Dup(), world.Dup(), world.Dup()
        self.node = self.comm.Split_type(mpi.COMM_TYPE_SHARED, key=self.comm.rank)
        self.leaders = self.comm.Split(0 if self.node.rank == 0 else mpi.UNDEFINED, key=self.comm.rank)
        """The first rank of each node; MPI.COMM_NULL on other ranks."""
        self.group, self.members = mpi.COMM_NULL, np.zeros(0, dtype=np.int64)
        """The communicator of the ranks that `connect` names; COMM_NULL on others."""

    def connect(self, ranks: np.ndarray) -> None:
        """Let `group` be a communicator of some ranks; every rank calls this."""
        if self.group != self.mpi.COMM_NULL:
            self.group.Free()
        self.members = ranks
        self.group = self.comm.Split(0 if self.comm.rank in ranks else self.mpi.UNDEFINED, key=self.comm.rank)

    def placement(self, original_ranks: np.ndarray) -> Placement:
        """Return the placement of this rank; every rank calls this.

        Args:
            original_ranks: `[R]` int64, the number of each rank at the start of the job.
        """
        lowest, nodes = np.array([self.comm.rank], dtype=np.int64), np.empty(self.comm.size, dtype=np.int64)
        self.node.Bcast(lowest, root=0)
        self.comm.Allgather(lowest, nodes)
        sharers, mine = np.zeros((2, MOST_PROCESSORS), dtype=np.int64)
        mine[list(own_processors())] = 1
        self.node.Allreduce(mine, sharers, op=self.mpi.SUM)
        return Placement(
            rank=self.comm.rank,
            host=host_name(),
            local_rank=self.node.rank,
            cores=share_of_cores(sharers),
            nodes=np.unique(nodes, return_inverse=True)[1].astype(np.int64),
            original_ranks=original_ranks,
            mpi=self._library(),
        )

    def _library(self) -> MPILibrary:
        mpi, version = self.mpi, self.mpi.Get_library_version().rstrip("\0")  # which ends Open MPI's
        levels = {
            mpi.THREAD_SINGLE: "single",
            mpi.THREAD_FUNNELED: "funneled",
            mpi.THREAD_SERIALIZED: "serialized",
            mpi.THREAD_MULTIPLE: "multiple",
        }
        return MPILibrary(
            library=" ".join(version.split("\n")[0].split()),
            transport=transport_of(version),
            thread_level=levels[mpi.Query_thread()],
            survives=is_fault_tolerant(mpi.Get_library_version()),
            clock_resolution_s=time.get_clock_info("perf_counter").resolution,
        )

    def revoke(self) -> None:
        """Wake every rank that waits on one of the communicators (ULFM)."""
        for comm in (self.comm, self.progress, self.stalled, self.node, self.leaders, self.group, self.world):
            if comm != self.mpi.COMM_NULL:
                comm.Revoke()

    def free(self) -> None:
        """Free the communicators that this object has made, but for those that others free: progress and stalled."""
        for comm in (self.leaders, self.group):
            if comm != self.mpi.COMM_NULL:
                comm.Free()
        self.node.Free()
        self.comm.Free()
