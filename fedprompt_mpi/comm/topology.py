"""Rank -> host -> cores -> GPU."""

import dataclasses
import os
import socket

import numpy as np

MOST_PROCESSORS = 8192
"""More than any node has."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    local_rank: int
    """Among the ranks of its node."""
    server_here: bool
    """Whether rank 0 runs on the same node."""
    cores: float
    """Processors that this rank has: of one that several ranks may use, its share."""


def own_processors() -> set[int]:
    """Return the processors this process may run on, as a batch system or launcher has bound it."""
    return os.sched_getaffinity(0)


def read_place(rank: int, local_rank: int, sharers: np.ndarray, *, server_here: bool) -> Place:
    """Return this process's place.

    Args:
        rank: in the job.
        local_rank: among the ranks of its node.
        sharers: `[MOST_PROCESSORS]` int64, how many ranks of the node may use each processor.
        server_here: whether rank 0 runs on this node.
    """
    cores = float((1 / sharers[list(own_processors())]).sum())
    return Place(rank=rank, host=socket.gethostname(), local_rank=local_rank, server_here=server_here, cores=cores)


def bind_device(gpus: int, place: Place, *, is_worker: bool) -> str:
    """Return the torch device of a rank: workers take the node's GPUs in turn, rank 0 takes none.

    `CUDA_VISIBLE_DEVICES`, and with it Slurm's binding, is respected: `gpus` counts visible devices only, and a
    worker that sees one takes that one.

    Args:
        gpus: CUDA devices this process sees and may use.
        place: where this rank runs.
        is_worker: whether it trains; rank 0 does so only when it is alone.
    """
    if gpus == 0 or not is_worker:
        return "cpu"
    # on rank 0's node the workers are one further down the node's ranks
    return f"cuda:{(place.local_rank - int(place.server_here and place.rank > 0)) % gpus}"


def thread_count(place: Place, environment_threads: str | None, *, one_client_a_pass: bool) -> int:
    """Return how many threads a rank computes with.

    `OMP_NUM_THREADS` decides where it is set. Otherwise it is as many as the rank has cores; but one with one
    client a pass, which promises the same bits on any number of ranks.
    """
    if environment_threads and environment_threads.isdigit() and int(environment_threads) > 0:
        return int(environment_threads)
    return 1 if one_client_a_pass else max(1, int(place.cores + 1e-6))
