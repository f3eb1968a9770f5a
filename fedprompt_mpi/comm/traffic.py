"""Traffic of a round: by the algorithm's definition, and on the network between nodes.

By definition a vector goes to each client and comes back from each, whatever ranks and nodes there are: the FedPrompt
paper counts so. The network carries less, since ranks of one node share memory and a collective sends a vector to a
node once. In a broadcast each node but rank 0's receives it once; in a gather the updates of clients on other nodes
than rank 0's cross once; in a reduction each node but rank 0's sends one sum. A library that broadcasts large vectors
by scatter and allgather (MPICH from 8 nodes on) sends the same over each link and up to as much again to rank 0's node.

Legend: R ranks, N nodes.
"""

import dataclasses

import numpy as np

from fedprompt_mpi.comm.chunks import chunks_of
from fedprompt_mpi.comm.codec import Codec


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What travels one way in one round."""

    bytes: int
    """Of vectors, once per client."""
    messages: int
    """One per client."""
    wire_bytes: int
    """Of vectors, from node to node, all links together."""
    wire_messages: int
    """From node to node; large updates travel in chunks."""


NOTHING = Traffic(bytes=0, messages=0, wire_bytes=0, wire_messages=0)


def together(one: Traffic, other: Traffic) -> Traffic:
    """Return the sum of two."""
    both = zip(dataclasses.astuple(one), dataclasses.astuple(other), strict=True)
    return Traffic(**dict(zip(Traffic.__slots__, map(sum, both), strict=True)))


TOLD_BYTES = 64
"""In a round rank 0 announces its vector and tells what follows from the headers, 32 bytes each."""


def to_root(nodes: np.ndarray, sizes: np.ndarray) -> Traffic:
    """Return the traffic of a gather of `sizes` `[R]` bytes from ranks on `nodes` `[R]`."""
    far, sent = nodes != nodes[0], sizes[1:]
    return Traffic(
        bytes=int(sent.sum()),
        messages=int((sent > 0).sum()),
        wire_bytes=int(sizes[far].sum()),
        wire_messages=int((sizes[far] > 0).sum()),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Journey:
    """Which vectors travel between which nodes in a round."""

    nodes: np.ndarray
    """`[R]` int64, the node of each rank."""
    counts: np.ndarray
    """`[R]` int64, clients on each rank."""
    size: int
    """P, numbers in a vector."""
    server_rows: int = 0
    """Vectors of rank 0 itself that are gathered beside the clients' (FLTrust): they never leave its node."""
    told_weights: int = 0
    """Numbers that rank 0 tells all ranks for a reduction."""

    def headers(self, item: int) -> Traffic:
        """Return the traffic of the updates' headers, of so many bytes each.

        What rank 0 tells all ranks in a round is counted with them: `TOLD_BYTES`, and the weights of a reduction.
        """
        told = TOLD_BYTES + 8 * self.told_weights
        up, others = to_root(self.nodes, item * self.counts), len(self.nodes) - 1
        return Traffic(
            bytes=up.bytes + others * told,
            messages=up.messages + 2 * others,
            wire_bytes=up.wire_bytes + self._far_nodes * told,
            wire_messages=up.wire_messages + 2 * self._far_nodes,
        )

    @property
    def _far_nodes(self) -> int:
        return len(np.unique(self.nodes)) - 1

    def down(self, codec: Codec) -> Traffic:
        """Return the traffic of one broadcast."""
        clients, size, far = int(self.counts.sum()), codec.bytes_of(self.size), self._far_nodes
        return Traffic(bytes=clients * size, messages=clients, wire_bytes=far * size, wire_messages=far)

    def up(self, codec: Codec, collective: str) -> Traffic:
        """Return the traffic of one gather, or of one reduction along the tree."""
        clients, size = int(self.counts.sum()), codec.bytes_of(self.size)
        if collective == "reduce":
            sent, messages = self._far_nodes, self._far_nodes * len(chunks_of(1, self.size))
        else:
            far = self.nodes != self.nodes[0]
            chunks = len(chunks_of(clients + self.server_rows, self.size))
            sent, messages = int(self.counts[far].sum()), int((self.counts[far] > 0).sum()) * chunks
        return Traffic(bytes=clients * size, messages=clients, wire_bytes=sent * size, wire_messages=messages)
