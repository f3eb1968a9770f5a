"""What a collective asks of the network: messages one after the other, bytes on each link, bytes in all.

A collective's time is that of its longest chain of messages and of its busiest link (LogGP: a message of n bytes takes
L + 2 o + n G, and a process sends or receives one every g; here alpha is L + 2 o, and G that of the link):

    seconds = messages alpha + received g + stretch max(wire G, total G_shared) + local

Each function says which messages there are, as the collective is really done; `Links` knows the constants.

Legend: N nodes, r ranks a node, R ranks, P numbers and n bytes of a vector, K clients, D = ceil(log2 N).

References:
    Alexandrov, Ionescu, Schauser and Scheiman, LogGP: Incorporating Long Messages into the LogP Model, SPAA 1995.
    Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, IJHPCA 2005
    (the broadcasts).
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from fedprompt_mpi.comm.chunks import chunk_columns
from fedprompt_mpi.comm.traffic import TOLD_BYTES

SHORT_BYTES, LONG_BYTES, FEW_NODES = 12_288, 524_288, 8
"""Where MPICH changes its broadcast: a tree below; beyond, a scatter, and an allgather by doubling or in a ring."""
HEADER_BYTES = 46
"""Of an update's header; a test holds that it is so."""


class Vector(NamedTuple):
    """A vector that travels."""

    numbers: int
    """P."""
    bytes: int
    """n, in its format."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Ranks on nodes, and the clients of a round on these."""

    ranks_on: tuple[int, ...]
    """Ranks of each node; rank 0 is on the first."""
    clients: int
    """K, of a round, in contiguous blocks of nearly equal size over the workers."""

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.ranks_on)

    @functools.cached_property
    def ranks(self) -> int:
        """R."""
        return sum(self.ranks_on)

    @functools.cached_property
    def ranks_per_node(self) -> int:
        """r, of the fullest node."""
        return max(self.ranks_on)

    @property
    def workers(self) -> int:
        """Ranks that hold clients."""
        return max(1, self.ranks - 1)

    @property
    def busy(self) -> int:
        """Workers that have a client."""
        return min(self.workers, self.clients)

    @property
    def most_on_a_worker(self) -> int:
        """Clients of the fullest worker."""
        return -(-self.clients // self.workers)

    @property
    def far(self) -> int:
        """Clients on other nodes than rank 0's."""
        return self.clients - self._before(self.ranks_on[0] - 1) if self.nodes > 1 else 0

    @property
    def far_workers(self) -> int:
        """Workers with clients on other nodes than rank 0's."""
        return max(0, self.busy - (self.ranks_on[0] - 1)) if self.nodes > 1 else 0

    @functools.cached_property
    def most_on_a_far_node(self) -> int:
        """Clients of the fullest other node."""
        ends = [*itertools.accumulate(self.ranks_on, initial=-1)][1:]  # workers up to the end of each node
        return max((self._before(stop) - self._before(start) for start, stop in itertools.pairwise(ends)), default=0)

    def _before(self, workers: int) -> int:
        """Return how many clients the first so many workers hold together; one process holds all itself."""
        if self.ranks == 1:
            return self.clients
        size, more = divmod(self.clients, self.workers)
        return size * workers + min(workers, more)


def evenly(nodes: int, ranks_per_node: int, clients: int) -> Placement:
    """Return the placement of K clients on N nodes of r ranks each."""
    return Placement((ranks_per_node,) * nodes, clients)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a collective asks for."""

    messages: float = 0.0
    """Between nodes, one after the other."""
    relays: float = 0.0
    """Messages that wait for the whole one before them, since their bytes are in it."""
    received: float = 0.0
    """Messages from other nodes that rank 0 receives beyond the first."""
    server_up: float = 0.0
    """Bytes that rank 0's node sends."""
    server_down: float = 0.0
    node_up: float = 0.0
    """Bytes that the busiest other node sends."""
    node_down: float = 0.0
    total: float = 0.0
    """Bytes on all links together."""
    local_messages: float = 0.0
    """Within a node, one after the other."""
    local: float = 0.0
    """Bytes copied within the busiest node."""

    @property
    def wire(self) -> float:
        """Bytes on the busiest link, if all links are equal."""
        return max(self.server_up, self.server_down, self.node_up, self.node_down)


def depth(count: int) -> int:
    """Return the steps of a binomial tree over so many."""
    return math.ceil(math.log2(count)) if count > 1 else 0


def is_mpich(library: str) -> bool:
    """Return True if an MPI library calls itself MPICH."""
    return "MPICH" in library


def broadcast(place: Placement, vector: Vector, library: str = "MPICH") -> Cost:
    """Return the cost of a broadcast: between the nodes first, then within each.

    A binomial tree sends n D bytes over rank 0's link. MPICH takes it up to 7 nodes, and below `SHORT_BYTES`; from 8
    nodes on it scatters the vector, n (N - 1) / N over rank 0's link, and every node gathers the parts of all others:
    as much again, in N - 1 steps of a ring, or D steps by doubling where N is a power of two and n below `LONG_BYTES`.
    Other libraries are taken to use the tree.
    """
    nodes, steps, size = place.nodes, depth(place.nodes), vector.bytes
    near = {"local_messages": depth(place.ranks_per_node), "local": size * depth(place.ranks_per_node)}
    if nodes == 1:
        return Cost(**near)
    total = size * (nodes - 1)
    if nodes < FEW_NODES or size < SHORT_BYTES or not is_mpich(library):
        return Cost(messages=steps, server_up=size * steps, node_down=size, total=total, **near)
    part = size * (nodes - 1) / nodes
    doubling = size < LONG_BYTES and nodes & (nodes - 1) == 0
    ring = steps if doubling else nodes - 1
    sent = {"server_up": 2 * part, "server_down": part, "node_up": 1.5 * part, "node_down": 1.5 * part}
    all_links = size * steps / 2 + total
    return Cost(messages=steps + ring, relays=steps + ring - 1, **sent, total=all_links, **near)


def chunks(rows: int, numbers: int) -> int:
    """Return in how many chunks K vectors of P numbers travel."""
    return -(-numbers // chunk_columns(rows, numbers))


def gather(place: Placement, vector: Vector) -> Cost:
    """Return the cost of a gather of K vectors at rank 0, in chunks that fit into its buffers.

    Every far client's vector crosses rank 0's link; each chunk is a message from every worker.
    """
    count, near = chunks(place.clients, vector.numbers), vector.bytes * (place.clients - place.far)
    local = {"local_messages": count if near else 0, "local": near}
    if place.nodes == 1:
        return Cost(**local)
    down, up = vector.bytes * place.far, vector.bytes * place.most_on_a_far_node
    received = count * max(0, place.far_workers - 1)
    return Cost(messages=count, received=received, server_down=down, node_up=up, total=down, **local)


def reduce(place: Placement, vector: Vector) -> Cost:
    """Return the cost of a sum along a binomial tree of nodes, after one within each node.

    Rank 0's node receives D sums of n bytes, one after the other; so does the busiest chain.
    """
    steps, near, count, size = depth(place.nodes), depth(place.ranks_per_node), chunks(1, vector.numbers), vector.bytes
    local = {"local_messages": count * near, "local": size * near}
    if place.nodes == 1:
        return Cost(**local)
    return Cost(
        messages=count * steps, server_down=size * steps, node_up=size, node_down=size * (steps - 1),
        total=size * (place.nodes - 1), **local,
    )  # fmt: skip


def headers(place: Placement, collective: str) -> Cost:
    """Return the cost of a round's small messages: what rank 0 announces and answers, and the updates' headers.

    Before a reduction rank 0 also tells every rank the unit and the weight of each update.
    """
    steps, far, others = depth(place.nodes), HEADER_BYTES * place.far, place.nodes - 1
    weights = 8 * (place.clients + 1) if collective == "reduce" else 0
    if place.nodes == 1:
        return Cost(local_messages=3 * depth(place.ranks_per_node))
    messages = (3 if weights else 2) * steps + 1
    return Cost(
        messages=messages, received=max(0, place.far_workers - 1), server_up=(TOLD_BYTES + weights) * steps,
        server_down=far, node_down=TOLD_BYTES + weights, total=far + (TOLD_BYTES + weights) * others,
        local_messages=3 * depth(place.ranks_per_node),
    )  # fmt: skip


def meetings(place: Placement, vector: Vector, collective: str) -> int:
    """Return how often all ranks wait for one another between the chunks of a round's updates."""
    return chunks(place.clients if collective == "gather" else 1, vector.numbers) - 1


def receive_buffers(place: Placement, vector: Vector, collective: str) -> float:
    """Return the bytes of rank 0's buffers: of one chunk of all vectors, or of two; and one of sums that arrive.

    What arrives in a short format is made numbers again, chunk by chunk.
    """
    if place.ranks == 1:
        return 0.0
    rows = place.clients if collective == "gather" else 1
    columns = chunk_columns(rows, vector.numbers)
    packed = rows * columns * vector.bytes / vector.numbers
    two = meetings(place, vector, collective) > 0 or collective == "reduce"
    unpacked = 4 * rows * columns if vector.bytes != 4 * vector.numbers else 0
    return (2 if two else 1) * packed + unpacked
