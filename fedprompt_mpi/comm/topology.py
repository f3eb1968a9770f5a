"""Rank -> host -> cores -> GPU."""

import dataclasses
import os
import socket


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank runs."""

    rank: int
    host: str
    local_rank: int
    """Among the ranks of its node."""
    local_size: int
    server_here: bool
    """Whether rank 0 runs on the same node."""
    cores: int
    """Processors that this process may use, shared with the node's other ranks unless bound apart."""


def read_place(rank: int, local_rank: int, local_size: int, *, server_here: bool) -> Place:
    """Return this process's place; its node-local numbers come from MPI."""
    return Place(
        rank=rank,
        host=socket.gethostname(),
        local_rank=local_rank,
        local_size=local_size,
        server_here=server_here,
        cores=len(os.sched_getaffinity(0)),
    )


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

    `OMP_NUM_THREADS` decides where it is set. Otherwise a node's ranks share its cores; and with one client
    a pass, which promises the same bits on any number of ranks, each takes one thread on any.
    """
    if environment_threads and environment_threads.isdigit() and int(environment_threads) > 0:
        return int(environment_threads)
    return 1 if one_client_a_pass else max(1, place.cores // place.local_size)
