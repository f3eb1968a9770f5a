"""Who shares masks with whom: in a large round each client has only some neighbours, about log K of them.

The clients stand in a circle in random order, each joined to the k / 2 nearest on both sides (a Harary graph). Three
things must hold, for every client of the round at once:

- of a client that is lost, enough neighbours are left to recover its key: P[X < t'] <= 2^-30 / K, where X of its k
  neighbours are among the t clients that are left;
- clients that collude with the server cannot recover a key: P[Y >= t'] <= 2^-40 / K, where Y of the k neighbours are
  among a fifth of the others;
- the honest clients that are left are connected, so that only their sum is known: the circle falls apart only where two
  runs of k / 2 clients are lost or collude, with a probability of at most K^2 (share)^k <= 2^-40.

X and Y are hypergeometric. In rounds of fewer than `LEAST_SPARSE` clients, and where no k below K - 1 will do, all are
neighbours of all (Bonawitz et al.), and t' = t. The circle is drawn from the round's public random number: who colludes
must have been decided before.

Legend: K clients of the round, t of which must be left, k neighbours of each, t' shares that recover a secret.

References:
    Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017.
    Bell et al., Secure Single-Server Aggregation with (Poly)Logarithmic Overhead, CCS 2020, Algorithm 2 and Section 3.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

COLLUDING = 0.2
"""Share of the clients that may collude with the server."""
SECURITY_BITS, CORRECTNESS_BITS = 40, 30
LEAST_SPARSE = 100
"""Below, a complete graph costs little, and protects against all colluding clients but the t-th."""


class Neighbourhood(NamedTuple):
    """How many neighbours each client has, and how many shares of its secrets recover them."""

    neighbours: int
    """k."""
    threshold: int
    """t', of the k + 1 shares of a client's neighbours and its own."""


def least_clients(threshold: int | None, clients: int) -> int:
    """Return t, of K clients: what was asked for, or two thirds; at least 2, or the sum could be one update."""
    return max(2, math.ceil(2 * clients / 3) if threshold is None else threshold)


@functools.cache
def neighbourhood(clients: int, least: int, neighbours: int | None = None) -> Neighbourhood:
    """Return the smallest neighbourhood for K clients of which t must be left, of at least as many as asked for."""
    first = 2 * -(-(neighbours or 2) // 2)
    few = (_sparse(clients, least, k) for k in range(first, clients - 1, 2)) if clients >= LEAST_SPARSE else ()
    return next((found for found in few if found is not None), Neighbourhood(clients - 1, least))


def _sparse(clients: int, least: int, neighbours: int) -> Neighbourhood | None:
    """Return the neighbourhood of k neighbours, if it keeps what the module says."""
    bad = math.ceil(COLLUDING * clients)
    share = (clients - least + bad) / clients
    if 2 * math.log2(clients) + neighbours * math.log2(min(share, 1.0)) > -SECURITY_BITS:
        return None
    left = _tail(clients - 1, min(least, clients - 1), neighbours, 2.0**-CORRECTNESS_BITS / clients, upper=False)
    known = _tail(clients - 1, bad, neighbours, 2.0**-SECURITY_BITS / clients, upper=True)
    return Neighbourhood(neighbours, left) if 1 <= known <= left else None


def _tail(others: int, marked: int, drawn: int, bound: float, *, upper: bool) -> int:
    """Return the largest x with P[X < x] <= bound, or with `upper` the smallest x with P[X >= x] <= bound.

    Args:
        others: how many there are.
        marked: of them.
        drawn: of them without replacement, of which X are marked.
        bound: of the probability.
        upper: which tail.
    """
    total, at = 0.0, drawn if upper else 0
    while 0 <= at <= drawn:
        total += math.exp(
            _log_choose(marked, at) + _log_choose(others - marked, drawn - at) - _log_choose(others, drawn)
        )
        if total > bound:
            return at + 1 if upper else at
        at += -1 if upper else 1
    return 0 if upper else drawn


def _log_choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def graph(clients: Sequence[int], neighbours: int, rng: np.random.Generator) -> dict[int, list[int]]:
    """Return the neighbours of each client: k of them, or all others."""
    if neighbours >= len(clients) - 1:
        return {client: [other for other in clients if other != client] for client in clients}
    circle = [clients[place] for place in rng.permutation(len(clients))]
    steps = [step for step in range(-(neighbours // 2), neighbours // 2 + 1) if step]
    return {client: sorted(circle[(at + step) % len(circle)] for step in steps) for at, client in enumerate(circle)}
