"""Rules that compare updates by their distances: RFA, Krum, Multi-Krum, Bulyan, centred clipping.

Legend: K clients of the round, P parameters, f assumed malicious clients.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from fedprompt_mpi.rules.aggregator_base import Settings, Updates, clip_factors, honest_majority, middle
from fedprompt_mpi.rules.pairwise import ROWS, PairwiseRule, in_parallel, squared_distances
from fedprompt_mpi.rules.registry import aggregators
from fedprompt_mpi.rules.setting import setting


@aggregators.register("geometric_median")
class GeometricMedian(PairwiseRule):
    """RFA: the point with the least weighted sum of distances to all deltas. Breakdown: f with half of the weight.

    Smoothed Weiszfeld: v = sum b_k delta_k / sum b_k, b_k = n_k / max(nu, norm(v - delta_k)), from the weighted mean
    on. v is always a mean of the deltas, so that its distances follow from the inner products. An iteration
    needs no pass over the vectors; it stops when v has converged.

    References:
        Pillutla et al., Robust Aggregation for Federated Learning, 2019, arXiv:1912.13445, Algorithm 2.
    """

    withstands = True
    smoothing = 1e-6
    iterations = 1000

    least_clients = staticmethod(honest_majority)  # as if clients held equally many examples

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the weights of the deltas in their geometric median."""
        examples = updates.num_examples / updates.num_examples.sum()
        inner, weights = self.inner, examples
        for _ in range(self.iterations):
            products = np.einsum("ij,j->i", inner, weights)
            squares = inner.diagonal() - 2 * products + np.einsum("i,i", weights, products)
            betas = examples / np.maximum(np.sqrt(np.maximum(squares, 0.0)), self.smoothing)
            step = betas / betas.sum() - weights
            weights = weights + step
            if np.einsum("i,ij,j", step, inner, step) < (0.001 * self.smoothing) ** 2:  # v has converged
                break
        return weights


@aggregators.register("krum")
class Krum(PairwiseRule):
    """The one delta that is closest to its K - f - 2 closest others. Breakdown point: 2 f + 2 < K.

    References:
        Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017,
        arXiv:1703.02757, Section 4.
    """

    withstands = True
    weighs_examples = False

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2 f + 3."""
        return 2 * malicious + 3

    def weights(self, updates: Updates) -> np.ndarray:
        """Return 1 for the chosen client."""
        best = krum_order(self.inner, updates.assumed_malicious, updates.clients)[:1]
        return _equal_weights(best, len(updates.clients))


@aggregators.register("multi_krum")
class MultiKrum(Krum):
    """The mean of the K - f deltas of the best Krum scores. Breakdown point: 2 f + 2 < K.

    References:
        Blanchard et al., Machine Learning with Adversaries, 2017, arXiv:1703.02757 (Multi-Krum, m = K - f).
    """

    mean_at: ClassVar[Settings | None] = {"assumed_malicious": 0}

    def weights(self, updates: Updates) -> np.ndarray:
        """Return equal weights for the chosen clients."""
        count, malicious = len(updates.clients), updates.assumed_malicious
        return _equal_weights(krum_order(self.inner, malicious, updates.clients)[: count - malicious], count)


@aggregators.register("bulyan")
class Bulyan(Krum):
    """Krum chooses K - 2 f deltas one after the other; of each coordinate, the mean of those closest to the median.

    The mean is over K - 4 f deltas. Breakdown point: 4 f + 2 < K. The last choices have fewer candidates than Krum
    needs; then the closest neighbour alone decides.

    References:
        El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium, 2018, arXiv:1802.07927,
        Section 4.
    """

    mean_at: ClassVar[Settings | None] = {"assumed_malicious": 0}
    coordinate_wise = True

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 4 f + 3."""
        return 4 * malicious + 3

    def weights(self, updates: Updates) -> np.ndarray:
        """Return equal weights for the chosen clients."""
        chosen = bulyan_choice(self.inner, updates.assumed_malicious, updates.clients)
        self._averaged = len(chosen) - 2 * updates.assumed_malicious
        return _equal_weights(chosen, len(self.inner))

    def combine(self, chunk: slice, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return, of each column's chosen rows, the mean of those closest to their median."""
        ordered = np.sort(deltas[weights > 0], axis=0).astype(np.float64)
        count, averaged, median = len(ordered), self._averaged, middle(ordered)
        # in sorted order the values closest to the median are neighbours: find the window closest to it
        reach = [
            np.maximum(median - ordered[at], ordered[at + averaged - 1] - median) for at in range(count - averaged + 1)
        ]
        first = np.argmin(reach, axis=0)
        columns = np.arange(ordered.shape[1])
        total = np.zeros(ordered.shape[1])
        for offset in range(averaged):
            total += ordered[first + offset, columns]
        return total / averaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class CentredClippingOptions:
    """Options of centred_clipping."""

    clip_radius: float = setting(1.0, above=0)
    """centred_clipping: what an update may differ from the centre by, at most."""
    clip_iterations: int = setting(1, at_least=1)
    """centred_clipping: steps in which the centre moves; it begins at the last round's result."""


@aggregators.register("centred_clipping", options=CentredClippingOptions)
class CentredClipping(PairwiseRule):
    """Clip each update to a ball around the last round's result: v + sum s_k (delta_k - v) min(1, tau / norm).

    s_k is the client's share of the examples. The centre v begins at what the rule returned in the round before (0 in
    the first), and moves so in each of `clip_iterations` steps. No breakdown point in f: a client moves a step of the
    centre by at most tau times its share.

    References:
        Karimireddy et al., Learning from History for Byzantine Robust Optimization, ICML 2021, arXiv:2012.10333,
        Algorithm 2 and Equation 8 (of the clients' momenta there, of their updates here).
    """

    withstands = True
    mean_at: ClassVar[Settings | None] = {"clip_radius": 1e9}

    def __init__(self, options: Any) -> None:
        """Start with a centre of zeros."""
        super().__init__(options)
        self._centre = np.zeros(0, dtype=np.float32)

    def begin(self, updates: Updates) -> None:
        """Reset the inner products, of the centre and the deltas."""
        self._inner, self._is_whole = np.zeros((len(updates.clients) + 1,) * 2), True
        if len(self._centre) != updates.parameters:
            self._centre = np.zeros(updates.parameters, dtype=np.float32)

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add the inner products of this chunk."""
        self._add(np.concatenate([self._centre[None, chunk], deltas]))

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the weights of the deltas; that of the last centre is kept for `combine`."""
        inner, shares = self.inner, np.concatenate([[0.0], updates.num_examples / updates.num_examples.sum()])
        weights = np.zeros(len(shares))
        weights[0] = 1.0  # v is always a mean of the last centre and the deltas
        for _ in range(self.options.clip_iterations):
            products = np.einsum("ij,j", inner, weights)
            squares = inner.diagonal() - 2 * products + np.einsum("i,i", weights, products)
            pull = shares * clip_factors(np.sqrt(np.maximum(squares, 0.0)), self.options.clip_radius)
            weights = (1 - pull.sum()) * weights + pull
        self._of_centre = weights[0]
        return weights[1:]

    def combine(self, chunk: slice, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the new centre."""
        moved = super().combine(chunk, deltas, weights) + self._of_centre * self._centre[chunk]
        self._centre[chunk] = moved
        return moved

    def state_shapes(self, clients: int, size: int) -> dict[str, tuple[int, ...]]:
        """Return that of the centre."""
        return {"centred_clipping_centre": (size,)}

    def state(self) -> dict[str, np.ndarray]:
        """Return the centre."""
        return {"centred_clipping_centre": self._centre}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the centre of a checkpoint."""
        self._centre = state["centred_clipping_centre"]


def krum_order(inner: np.ndarray, malicious: int, clients: np.ndarray) -> np.ndarray:
    """Return the places of the clients from the best Krum score to the worst `[K]` int64.

    The score is the sum of a client's K - f - 2 smallest squared distances to others (at least one). Of clients with
    the same score the one with the lowest id comes first, as in the paper. (Two clients that are each other's only
    neighbour have the same score.)

    Args:
        inner: `[K, K]` float64, the inner products of all pairs.
        malicious: f.
        clients: `[K]` int64 ids.
    """
    count = len(inner)
    neighbours, scores = max(count - malicious - 2, 1), np.empty(count)

    def score(at: int) -> None:
        rows = slice(at, at + ROWS)
        distances = squared_distances(inner, rows)
        distances.sort(axis=1)
        scores[rows] = distances[:, 1 : 1 + neighbours].sum(axis=1)  # the first is its own, 0

    in_parallel(score, range(0, count, ROWS))
    return np.lexsort((clients, scores))


def bulyan_choice(inner: np.ndarray, malicious: int, clients: np.ndarray) -> np.ndarray:
    """Return the places of the K - 2 f clients that Krum chooses one after the other from those left `[K - 2 f]` int64.

    When a client leaves, each of the others has one neighbour less to count: the one that has left, or else its
    farthest. So the distances are sorted once.

    Args:
        inner: `[K, K]` float64, the inner products of all pairs.
        malicious: f.
        clients: `[K]` int64 ids.
    """
    count = len(inner)
    everyone, wanted, chosen = np.arange(count), count - 2 * malicious, []
    distances = squared_distances(inner)
    np.fill_diagonal(distances, -1.0)  # each client itself comes first, and does not count
    order = np.argsort(distances, axis=1)
    np.fill_diagonal(distances, 0.0)
    place = np.empty_like(order)  # [j, i]: place of client j in the order of client i
    place[order, everyone[:, None]] = everyone
    farthest = np.full(count, count - malicious - 2)  # place of the last neighbour that counts
    counts = np.tile((everyone > 0) & (everyone <= farthest[0]), (count, 1))
    nearest = np.where(counts, np.take_along_axis(distances, order, axis=1), 0.0)
    scores = nearest.sum(axis=1)
    rounding = 4 * count * np.finfo(np.float64).eps * scores.max()  # of all subtractions together
    while len(chosen) < min(wanted, count - malicious - 3):
        near = np.flatnonzero(scores <= scores.min() + rounding)
        best = int(near[np.lexsort((clients[near], nearest[near].sum(axis=1)))[0]])
        chosen.append(best)
        at = np.minimum(place[best], farthest)
        scores -= nearest[everyone, at]
        scores[best] = np.inf
        nearest[everyone, at], counts[everyone, at] = 0.0, False
        while len(stale := np.flatnonzero((scores < np.inf) & ~counts[everyone, farthest])):
            farthest[stale] -= 1
    left = scores < np.inf
    while len(chosen) < wanted:  # each has one neighbour
        rest = np.flatnonzero(left)
        chosen.append(rest[krum_order(inner[np.ix_(rest, rest)], malicious, clients[rest])[0]])
        left[chosen[-1]] = False
    return np.array(chosen)


def _equal_weights(chosen: np.ndarray, count: int) -> np.ndarray:
    weights = np.zeros(count)
    weights[chosen] = 1 / len(chosen)
    return weights
