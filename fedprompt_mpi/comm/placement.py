"""Placement of the ranks: rank -> host -> cores -> GPU, and the MPI library that connects them."""

import dataclasses
import os
import socket
from collections.abc import Collection

import numpy as np

from fedprompt_mpi.config import SettingsError

MOST_PROCESSORS = 8192
"""More than any node has."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MPILibrary:
    """The MPI library of a job, as `doctor` prints it and environment.json has it."""

    library: str
    """Name and version."""
    transport: str
    """What carries its messages, as far as the library tells."""
    thread_level: str
    """How threads may use MPI."""
    survives: bool
    """True if the job was started so that it survives a lost rank (ULFM)."""
    clock_resolution_s: float
    """Resolution of the clock that times the phases."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a rank runs, among all others. Legend: R ranks."""

    rank: int
    host: str
    local_rank: int
    """Number among the ranks of its node."""
    cores: float
    """Processors of this rank; of one that several ranks may use, its share."""
    nodes: np.ndarray
    """`[R]` int64: the node of each rank, numbered from 0 in the order of their lowest ranks."""
    original_ranks: np.ndarray
    """`[R]` int64: the number of each rank at the start of the job, before ranks were lost."""
    mpi: MPILibrary

    @property
    def server_here(self) -> bool:
        """True if rank 0 runs on the same node."""
        return bool(self.nodes[self.rank] == self.nodes[0])


def own_processors() -> set[int]:
    """Return the processors this process may run on, as a batch system or launcher has bound it."""
    return os.sched_getaffinity(0)


def describe_processors(processors: Collection[int]) -> str:
    """Return processors as the kernel writes a list of them, such as 0-3,8."""
    chosen = set(processors)
    first = sorted(p for p in chosen if p - 1 not in chosen)
    last = sorted(p for p in chosen if p + 1 not in chosen)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def share_of_cores(sharers: np.ndarray) -> float:
    """Return how many processors this process has, counting a shared one by its share.

    Args:
        sharers: `[MOST_PROCESSORS]` int64, how many ranks of the node may use each processor.
    """
    return float((1 / sharers[list(own_processors())]).sum())


def host_name() -> str:
    """Return the name of this host."""
    return socket.gethostname()


def bind_device(gpus: int, placement: Placement, *, is_worker: bool) -> str:
    """Return the torch device of a rank: workers take the node's GPUs in turn, rank 0 takes none.

    `CUDA_VISIBLE_DEVICES`, and with it Slurm's binding, is respected: `gpus` counts visible devices only, and a worker
    that sees one device takes that one.

    Args:
        gpus: CUDA devices this process sees and may use.
        placement: where this rank runs.
        is_worker: True if the rank trains; rank 0 does so only when it is alone.
    """
    if gpus == 0 or not is_worker:
        return "cpu"
    # on rank 0's node the first rank takes no GPU
    return f"cuda:{(placement.local_rank - int(placement.server_here and placement.rank > 0)) % gpus}"


MOST_THREADS_PER_PROCESSOR = 8


def thread_count(placement: Placement, environment_threads: str | None, *, one_client_a_pass: bool) -> int:
    """Return the number of threads with which a rank computes.

    `OMP_NUM_THREADS` decides where it is set. Otherwise a rank takes as many threads as it has cores. With one client
    a pass, which promises the same bits on any number of ranks, it takes one.

    Raises:
        SettingsError: if `OMP_NUM_THREADS` is far beyond what the host has.
    """
    if environment_threads and environment_threads.isdigit() and int(environment_threads) > 0:
        most = MOST_THREADS_PER_PROCESSOR * (os.cpu_count() or 1)
        if int(environment_threads) > most:
            raise SettingsError(
                f"OMP_NUM_THREADS is {environment_threads}, and this host has {os.cpu_count()} processors: "
                f"give at most {most}, or leave it out"
            )
        return int(environment_threads)
    return 1 if one_client_a_pass else max(1, int(placement.cores + 1e-6))
