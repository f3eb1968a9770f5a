"""How much travels in a round: by the algorithm's definition, and on the wire between nodes.

By definition a vector goes to each client and comes back from each, whatever ranks and nodes there are; so the paper
counts. What the wire carries is less, since ranks of one node share memory and a collective sends a vector to a node
once: in a broadcast each node but rank 0's receives it once; in a gather the updates of clients on other nodes than
rank 0's cross once; in a reduction each node but rank 0's sends one sum. A library that broadcasts large vectors by
scatter and allgather (MPICH from 8 nodes on) sends the same over each link and up to as much again to rank 0's node.

Legend: R ranks, N nodes.
"""

import dataclasses

import numpy as np

from fedprompt_mpi.comm.channel import pieces_of
from fedprompt_mpi.comm.wire import Wire


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What goes one way in one round."""

    bytes: int
    """Of vectors, once per client."""
    messages: int
    """One per client."""
    wire_bytes: int
    """Of vectors, from node to node, all links together."""
    wire_messages: int
    """From node to node; large updates come in pieces."""


NOTHING = Traffic(bytes=0, messages=0, wire_bytes=0, wire_messages=0)


def broadcast_traffic(nodes: np.ndarray, *, clients: int, bytes_: int) -> Traffic:
    """Return what one broadcast moves.

    Args:
        nodes: `[R]` int64, the node of each rank.
        clients: how many need the vector.
        bytes_: of the vector on the wire.
    """
    others = len(np.unique(nodes)) - 1
    return Traffic(bytes=clients * bytes_, messages=clients, wire_bytes=others * bytes_, wire_messages=others)


def gather_traffic(nodes: np.ndarray, counts: np.ndarray, *, bytes_: int, pieces: int) -> Traffic:
    """Return what one gather moves.

    Args:
        nodes: `[R]` int64, the node of each rank.
        counts: `[R]` int64, clients on each rank.
        bytes_: of one client's update on the wire.
        pieces: in which it goes.
    """
    far = nodes != nodes[0]
    clients, from_far = int(counts.sum()), int(counts[far].sum())
    return Traffic(
        bytes=clients * bytes_,
        messages=clients,
        wire_bytes=from_far * bytes_,
        wire_messages=int((counts[far] > 0).sum()) * pieces,
    )


def reduce_traffic(nodes: np.ndarray, counts: np.ndarray, *, bytes_: int, pieces: int) -> Traffic:
    """Return what one tree sum moves; arguments as of `gather_traffic`."""
    others, clients = len(np.unique(nodes)) - 1, int(counts.sum())
    return Traffic(bytes=clients * bytes_, messages=clients, wire_bytes=others * bytes_, wire_messages=others * pieces)


def round_traffic(
    nodes: np.ndarray, counts: np.ndarray, size: int, *, collective: str, wire_down: Wire, wire_up: Wire
) -> tuple[Traffic, Traffic]:
    """Return what goes down and what comes up in a round.

    Args:
        nodes: `[R]` int64, the node of each rank.
        counts: `[R]` int64, clients on each rank.
        size: P.
        collective: gather or reduce.
        wire_down: format of what rank 0 sends.
        wire_up: format of what clients send.
    """
    clients = int(counts.sum())
    down = broadcast_traffic(nodes, clients=clients, bytes_=wire_down.bytes_of(size))
    if collective == "reduce":
        return down, reduce_traffic(nodes, counts, bytes_=wire_up.bytes_of(size), pieces=len(pieces_of(1, size)))
    return down, gather_traffic(nodes, counts, bytes_=wire_up.bytes_of(size), pieces=len(pieces_of(clients, size)))
