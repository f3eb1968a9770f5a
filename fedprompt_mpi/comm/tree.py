"""Sums of whole numbers along a tree: within each node by MPI in shared memory, then from node to node.

Between nodes it is a binomial tree of point-to-point messages of our own. MPI libraries reduce large vectors by ways
that depend on the number of ranks and put up to half as much again on the wire; here each node but rank 0's sends one
sum, so what the wire carries is known. Segments let a node add one while the next is on its way.

Legend: N nodes, P numbers.
"""

from typing import Any

import numpy as np

SEGMENT_BYTES = 2**20
TAG = 11


def sum_to_root(
    mpi: Any, node: Any, leaders: Any, mine: np.ndarray, total: np.ndarray, arriving: np.ndarray
) -> np.ndarray | None:
    """Add up everybody's `mine` `[P]` int32; returns the total, in `total`, on rank 0, None elsewhere.

    Args:
        mpi: mpi4py's module.
        node: communicator of this node's ranks, in rank order.
        leaders: communicator of the nodes' lowest ranks, in rank order; MPI.COMM_NULL on the other ranks.
        mine: contiguous, as are the next two.
        total: `[P]` int32, to be overwritten.
        arriving: the same.
    """
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
