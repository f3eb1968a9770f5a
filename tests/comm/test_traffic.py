"""What travels, by definition and from node to node, worked out by hand."""

import numpy as np
import pytest

from fedprompt_mpi.comm import chunks
from fedprompt_mpi.comm.codec import Float32
from fedprompt_mpi.comm.traffic import Journey, Traffic, to_root
from fedprompt_mpi.rules import registry

NODES = np.array([0, 0, 1, 1, 2])
COUNTS = np.array([0, 3, 3, 2, 2])
P = 1000


def _traffic(nodes: np.ndarray, counts: np.ndarray, **settings: str) -> tuple[Traffic, Traffic]:
    down, up = (registry.wire_formats[settings.get(way, "float32")]() for way in ("down", "up"))
    collective = settings.get("collective", "gather")
    journey = Journey(nodes=nodes, counts=counts, size=P)
    return journey.down(down), journey.up(up, collective)


def test_three_nodes() -> None:
    """Ten clients; seven of them are not on rank 0's node, on three ranks of the other two nodes."""
    down, up = _traffic(NODES, COUNTS)
    assert down == Traffic(bytes=40_000, messages=10, wire_bytes=8_000, wire_messages=2)
    assert up == Traffic(bytes=40_000, messages=10, wire_bytes=28_000, wire_messages=3)


def test_a_tree_sum_sends_one_vector_a_node() -> None:
    _, up = _traffic(NODES, COUNTS, collective="reduce")
    assert up == Traffic(bytes=40_000, messages=10, wire_bytes=8_000, wire_messages=2)


def test_short_formats() -> None:
    down, up = _traffic(NODES, COUNTS, down="bfloat16", up="int8")
    assert (down.bytes, down.wire_bytes) == (20_000, 4_000)
    assert (up.bytes, up.wire_bytes) == (10_040, 7_028)


def test_one_node_needs_no_wire() -> None:
    down, up = _traffic(np.zeros(5, dtype=np.int64), COUNTS)
    assert (down.wire_bytes, up.wire_bytes, up.wire_messages) == (0, 0, 0)
    assert (down.bytes, up.bytes) == (40_000, 40_000)


def test_an_empty_cohort_is_still_broadcast() -> None:
    """Every node keeps up with the vector, though no client asked for it."""
    down, up = _traffic(NODES, np.zeros(5, dtype=np.int64))
    assert (down.bytes, down.wire_bytes, up.bytes, up.wire_bytes, up.wire_messages) == (0, 8_000, 0, 0, 0)


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 numbers go down in one message, and come up in pieces of 256 of ten clients each."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2048)
    down, up = _traffic(NODES, COUNTS)
    assert (down.wire_messages, up.wire_messages) == (2, 3 * 4)


def test_the_server_s_own_update_counts_for_the_chunks() -> None:
    """FLTrust gathers K + 1 rows: 25.4 million numbers of ten clients then travel in 17 chunks, not in 16."""
    size, counts = 25_420_032, np.array([0, 5, 5])
    nodes = np.array([0, 1, 1])
    without = Journey(nodes=nodes, counts=counts, size=size).up(Float32(), "gather")
    beside = Journey(nodes=nodes, counts=counts, size=size, server_rows=1).up(Float32(), "gather")
    assert (without.wire_messages, beside.wire_messages) == (2 * 16, 2 * 17)
    assert (without.bytes, without.wire_bytes) == (beside.bytes, beside.wire_bytes)


def test_headers_and_what_rank_0_tells() -> None:
    """Of 40 bytes: ten go up, seven of them from three ranks of other nodes; 64 bytes go to four ranks, two nodes."""
    headers = Journey(nodes=NODES, counts=COUNTS, size=P).headers(40)
    assert headers == Traffic(bytes=400 + 4 * 64, messages=4 + 8, wire_bytes=7 * 40 + 2 * 64, wire_messages=3 + 4)
    weights = Journey(nodes=NODES, counts=COUNTS, size=P, told_weights=11).headers(40)
    assert weights.wire_bytes - headers.wire_bytes == 2 * 88


def test_a_gather_of_uneven_sizes() -> None:
    """Rank 0's own stay where they are, rank 1's stay on its node."""
    assert to_root(NODES, np.array([9, 10, 20, 0, 30])) == Traffic(bytes=60, messages=3, wire_bytes=50, wire_messages=2)
