"""Sums of whole numbers along a tree: within each node by MPI in shared memory, then from node to node.

Between nodes the sum follows a binomial tree of point-to-point messages. MPI libraries choose algorithms by the number
of ranks, and some send half as much again. Here each node but rank 0's sends exactly one sum, so the bytes on the
network are known. Vectors travel in segments: a node adds one while the next one arrives.

Legend: N nodes, P numbers.
"""

from typing import Any

import numpy as np

SEGMENT_BYTES = 2**20
TAG = 11


def sum_to_root(comms: Any, mine: np.ndarray, total: np.ndarray, arriving: np.ndarray) -> np.ndarray | None:
    """Return the sum of `mine` `[P]` uint32 over all ranks modulo 2^32, in `total`, on rank 0; None elsewhere.

    Args:
        comms: a `Communicators`, of which `mpi`, `node` and `leaders` are used.
        mine: contiguous, as are the next two.
        total: `[P]` uint32, to be overwritten.
        arriving: `[P]` uint32, to be overwritten.
    """
    mpi, node, leaders = comms.mpi, comms.node, comms.leaders
    node.Reduce(mine, total if node.rank == 0 else None, op=mpi.SUM, root=0)
    if node.rank:
        return None
    segments = [slice(at, at + SEGMENT_BYTES // 4) for at in range(0, len(mine), SEGMENT_BYTES // 4)]
    distance = 1
    while distance < leaders.size:
        if leaders.rank & distance:
            mpi.Request.Waitall([leaders.Isend(total[s], leaders.rank - distance, TAG) for s in segments])
            return None
        child = leaders.rank + distance
        if child < leaders.size:
            requests = [leaders.Irecv(arriving[s], child, TAG) for s in segments]
            for segment, request in zip(segments, requests, strict=True):
                request.Wait()
                total[segment] += arriving[segment]
        distance *= 2
    return total
