"""How many neighbours a client needs, and who they are."""

import math

import numpy as np
import pytest
from scipy.stats import hypergeom

from fedprompt_mpi.secagg.neighbours import COLLUDING, graph, least_clients, neighbourhood


def test_small_rounds_are_complete_and_large_ones_grow_with_log_k() -> None:
    assert neighbourhood(10, 7).neighbours == 9 and neighbourhood(10, 7).threshold == 7
    counts = [neighbourhood(10**power, math.ceil(0.8 * 10**power)).neighbours for power in (3, 4, 5, 6)]
    assert counts == sorted(counts)
    assert max(np.diff(counts)) <= 30, counts  # ten times the clients: some more neighbours, not ten times as many


@pytest.mark.parametrize(("clients", "share"), [(100, 2 / 3), (100, 1.0), (1000, 2 / 3), (1000, 0.9), (10**6, 0.8)])
def test_the_bounds_of_a_neighbourhood_hold(clients: int, share: float) -> None:
    """By SciPy's hypergeometric distribution; and with two neighbours less they do not."""
    least = math.ceil(share * clients)
    found, bad = neighbourhood(clients, least), math.ceil(COLLUDING * clients)

    def is_safe(neighbours: int, threshold: int) -> bool:
        left = clients * float(hypergeom.cdf(threshold - 1, clients - 1, min(least, clients - 1), neighbours))
        known = clients * float(hypergeom.sf(threshold - 1, clients - 1, bad, neighbours))
        apart = clients**2 * ((clients - least + bad) / clients) ** neighbours
        return left <= 2.0**-30 and known <= 2.0**-40 and apart <= 2.0**-40

    assert is_safe(found.neighbours, found.threshold)
    assert not any(is_safe(found.neighbours - 2, threshold) for threshold in range(1, found.neighbours - 1))


def test_more_neighbours_may_be_asked_for() -> None:
    needed = neighbourhood(1000, 800).neighbours
    assert neighbourhood(1000, 800, needed + 11).neighbours == needed + 12  # an even number
    assert neighbourhood(1000, 800, 20) == neighbourhood(1000, 800)
    assert neighbourhood(10, 7, 50) == neighbourhood(10, 7)


@pytest.mark.parametrize("clients", [2, 4, 22, 57, 99])
def test_small_rounds_are_complete_whatever_must_be_left(clients: int) -> None:
    """A ring of four clients would let two neighbours and the server know a third one's update."""
    for least in range(2, clients + 1):
        assert neighbourhood(clients, least) == (clients - 1, least)


def test_threshold() -> None:
    assert [least_clients(None, clients) for clients in (0, 1, 2, 3, 10, 1000)] == [2, 2, 2, 2, 7, 667]
    assert least_clients(5, 10) == 5


@pytest.mark.parametrize(("clients", "neighbours"), [(7, 6), (50, 4), (51, 10)])
def test_the_graph_is_regular_symmetric_connected_and_random(clients: int, neighbours: int) -> None:
    ids = list(range(100, 100 + clients))
    found = graph(ids, neighbours, np.random.default_rng(0))
    assert list(found) != [] and set(found) == set(ids)
    for one, others in found.items():
        assert len(others) == len(set(others)) == neighbours and one not in others
        assert all(one in found[other] for other in others)
    reached, at = {ids[0]}, [ids[0]]
    while at:
        new = set(found[at.pop()]) - reached
        reached |= new
        at += new
    assert reached == set(ids)
    assert neighbours == clients - 1 or found != graph(ids, neighbours, np.random.default_rng(1))
