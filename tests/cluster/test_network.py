"""On links of a known rate: transfer is what the rate allows, bytes are what the kernel counts, a sleeper moves wait.

Rank 0 has node0 for itself, two workers each are on node1 and node2.
"""

import json
from typing import Any

import pytest

from tests.cluster.probe import SLEEP_S
from tests.cluster.virtual import Cluster

RANKS = (1, 2, 2)
NUMBERS = 1_536_000
BYTES = 4 * NUMBERS
GOODPUT = 1448 / 1514
"""What is left of a link's rate for the content of TCP segments in full Ethernet frames."""
BUSIEST = {"broadcast": 2, "gather": 4, "reduce": 2}
"""Vectors over rank 0's link: one to each other node, one from each worker, or a sum from each other node."""


def _probe(cluster: Cluster, what: str, numbers: int, times: int, ranks: tuple[int, ...] = RANKS) -> dict[str, Any]:
    finished = cluster.mpirun(ranks, "-m", "tests.cluster.probe", what, str(numbers), str(times), deadline_s=180)
    assert finished.status == 0, finished
    return json.loads(finished.out.splitlines()[-1])


@pytest.fixture(scope="module")
def at_100_mbit(cluster: Cluster) -> dict[str, Any]:
    cluster.limit(100)
    return _probe(cluster, "times", NUMBERS, 5)


@pytest.fixture(scope="module")
def at_1_gbit(cluster: Cluster) -> dict[str, Any]:
    cluster.limit(1000)
    return _probe(cluster, "times", NUMBERS, 15)


def test_the_nodes_are_told_apart(at_100_mbit: dict[str, Any]) -> None:
    assert at_100_mbit["nodes"] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("collective", BUSIEST)
def test_transfer_is_what_the_rate_allows(at_100_mbit: dict[str, Any], collective: str) -> None:
    allowed = BUSIEST[collective] * BYTES * 8 / 100e6 / GOODPUT
    assert at_100_mbit[collective]["transfer"] == pytest.approx(allowed, rel=0.1)


@pytest.mark.parametrize("collective", BUSIEST)
def test_reported_bytes_are_those_that_the_kernel_counts(at_100_mbit: dict[str, Any], collective: str) -> None:
    found = at_100_mbit[collective]
    assert found["reported"] > 0
    assert found["counted"] == pytest.approx(found["reported"], rel=0.05)


@pytest.mark.parametrize("collective", ["broadcast", "gather"])
def test_transfer_is_that_of_the_raw_collective(at_1_gbit: dict[str, Any], collective: str) -> None:
    assert at_1_gbit[collective]["transfer"] == pytest.approx(at_1_gbit[collective]["raw"], rel=0.1)


def test_a_tree_sum_is_no_slower_than_the_library_s(at_1_gbit: dict[str, Any]) -> None:
    assert at_1_gbit["reduce"]["transfer"] < 1.1 * at_1_gbit["reduce"]["raw"]


def test_a_rank_that_sleeps_moves_wait_and_leaves_transfer(cluster: Cluster) -> None:
    cluster.limit(100)
    found = _probe(cluster, "sleep", 400_000, 5)
    (wait, wait_late), (transfer, transfer_late) = found["wait"], found["transfer"]
    assert wait_late - wait == pytest.approx(SLEEP_S, rel=0.1)
    assert transfer_late == pytest.approx(transfer, rel=0.1)


def test_every_byte_of_a_round_is_reported(cluster: Cluster) -> None:
    """Of 10,000 clients with int8: headers are a sixth of their updates, residuals four times as much."""
    cluster.limit(1000)
    found = _probe(cluster, "round", 256, 10_000)
    reported = found["reported"]
    assert reported["headers"] > 0.1 * reported["up"] > 0
    assert reported["checkpoint"] > 3 * reported["up"]
    assert found["counted"] == pytest.approx(sum(reported.values()), rel=0.05)


def test_barriers_and_agreed_starts_agree_for_large_vectors_and_differ_for_small_ones(cluster: Cluster) -> None:
    """All ranks read one clock here, which the exchanges between nodes find again.

    A large broadcast takes as long either way. The time of a small one contains the skew of the barriers' exits; at an
    agreed time it is shorter by up to that.
    """
    cluster.limit(1000)
    one_a_core = (1, 1)  # else a rank may not be running when the agreed time comes
    large, small = (_probe(cluster, "window", *what, one_a_core) for what in ((1_536_000, 15), (2_500, 200)))
    print(f"\n{large}\n{small}")
    for found in (large, small):
        assert found["offset_error_s"] < 2e-4
        assert found["window"]["repetitions"] >= 5
    assert large["window"]["transfer"] == pytest.approx(large["barrier"]["transfer"], rel=0.1)
    assert small["window"]["skew"] < 0.5 * small["barrier"]["skew"]
    gain = small["barrier"]["transfer"] - small["window"]["transfer"]
    assert abs(gain) < 3 * small["barrier"]["skew"]
