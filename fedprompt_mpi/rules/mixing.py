"""Nearest-neighbour mixing, which makes any rule fit for clients that differ.

Legend: K clients of the round, f assumed malicious clients.
"""

import dataclasses

import numpy as np

from fedprompt_mpi.rules.aggregator_base import Aggregator, Updates, honest_majority
from fedprompt_mpi.rules.pairwise import PairwiseRule, exact_product, squared_distances


class Mixed(PairwiseRule):
    """A rule over mixed updates: each is the mean of the K - f that are nearest to it, itself included.

    The server's own update (FLTrust) is left as it is. Breakdown point: that of the rule, and f < K / 2.

    References:
        Allouah et al., Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity, AISTATS 2023,
        arXiv:2302.01772, Algorithm 2.
    """

    def __init__(self, rule: Aggregator) -> None:
        """Mix in front of `rule`."""
        super().__init__(rule.options)
        self.rule, self.coordinate_wise, self.trains_itself = rule, rule.coordinate_wise, rule.trains_itself
        self.weighs_examples = rule.weighs_examples

    def is_weighted_sum(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the rule's own: `weights` are those of the clients' own deltas."""
        return self.rule.is_weighted_sum()

    @property
    def noise_std(self) -> float:
        """The rule's own."""
        return self.rule.noise_std

    def least_clients(self, malicious: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the K that the rule needs, and at least 2 f + 1."""
        return max(self.rule.least_clients(malicious), honest_majority(malicious))

    def most_malicious(self, clients: int) -> int | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the largest f that a number of clients allows; None if they are too few even for f = 0."""
        most = self.rule.most_malicious(clients)
        return None if most is None else min(most, (clients - 1) // 2)

    def begin(self, updates: Updates) -> None:
        """Prepare for a round."""
        super().begin(updates)
        self._updates, self._mixing = updates, None

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add inner products, and let the rule observe the mixed chunk once they are known."""
        if self._mixing is None:
            super().observe(chunk, deltas, vector)
        else:
            self.rule.observe(chunk, self._mixed(deltas), vector)

    def observed(self) -> bool:
        """Find the neighbours; let the rule observe if it must."""
        if self._mixing is not None:
            return self.rule.observed()
        self._mixing, updates = mixing_matrix(self.inner, self._updates), self._updates
        squares = np.einsum("ij,jk,ik->i", self._mixing, self.inner, self._mixing)
        self._updates = dataclasses.replace(updates, norms=np.sqrt(np.maximum(squares, 0.0)))
        self.rule.begin(self._updates)
        return self.rule.observes_first

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the weight of each client's own delta in a linear rule's result."""
        self._weights = self.rule.weights(self._updates)
        assert self._mixing is not None
        return self._weights @ self._mixing

    def combine(self, chunk: slice, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Combine the mixed deltas."""
        return self.rule.combine(chunk, self._mixed(deltas), self._weights)

    def _mixed(self, deltas: np.ndarray) -> np.ndarray:
        assert self._mixing is not None
        return exact_product(self._mixing, deltas)

    def state_shapes(self, clients: int, size: int) -> dict[str, tuple[int, ...]]:
        """Return those of the rule's state."""
        return self.rule.state_shapes(clients, size)

    def state(self) -> dict[str, np.ndarray]:
        """Return the rule's state."""
        return self.rule.state()

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Let the rule continue from a checkpoint."""
        self.rule.restore(state)


def mixing_matrix(inner: np.ndarray, updates: Updates) -> np.ndarray:
    """Return the share of each update in each mixed one `[K, K]`: 1 / (K - f) for its K - f nearest.

    Args:
        inner: `[K, K]` float64, the inner products of all pairs.
        updates: the headers. Of neighbours at the same distance the lower id is nearer.
    """
    own = updates.clients < updates.num_clients  # not the server's
    matrix, places = np.eye(len(inner)), np.flatnonzero(own)
    count = len(places) - updates.assumed_malicious
    distances = squared_distances(inner)[np.ix_(places, places)]
    np.fill_diagonal(distances, -1.0)
    for place, row in zip(places, distances, strict=True):
        nearest = places[np.lexsort((updates.clients[places], row))[:count]]
        matrix[place] = 0.0
        matrix[place, nearest] = 1 / count
    return matrix
