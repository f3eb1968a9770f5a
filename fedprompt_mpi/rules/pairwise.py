"""Rules that compare whole updates: by distance (RFA, Krum, Bulyan) or by angle (FoolsGold, FLTrust, FLAME).

They observe every chunk and sum the inner products of all pairs. Distances, angles and norms follow from the inner
products, as do the distances of any weighted mean: no further pass over the vectors is needed.

Legend: K clients of the round, P parameters, f assumed malicious clients.
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import threadpoolctl

from fedprompt_mpi.rules.aggregator_base import TINY, Aggregator, Updates, clip_factors, honest_majority, middle
from fedprompt_mpi.rules.setting import Comparison, setting
from fedprompt_mpi.rules.spill import zeros

ROWS, COLUMNS = 200, 2048
"""Clients whose inner products or distances are computed at a time, and the numbers of each: they stay in the cache."""


class PairwiseRule(Aggregator):
    """Base of the rules that compare updates: it sums the inner products of all pairs over the chunks."""

    observes_first = True

    def begin(self, updates: Updates) -> None:
        """Reset the inner products."""
        self._inner, self._is_whole = np.zeros((len(updates.clients), len(updates.clients))), True

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add the inner products of this chunk."""
        self._add(deltas)

    def _add(self, rows: np.ndarray) -> None:
        add_inner_products(self._inner, rows)
        self._is_whole = False

    @property
    def inner(self) -> np.ndarray:
        """`[K, K]` float64, the inner products of all pairs."""
        if not self._is_whole:
            for at in range(0, len(self._inner), ROWS):
                self._inner[:at, at : at + ROWS] = self._inner[at : at + ROWS, :at].T
            self._is_whole = True
        return self._inner

    @property
    def cosines(self) -> np.ndarray:
        """`[K, K]` float64 in [-1, 1]; that of a zero delta with any other is 0."""
        norms = np.maximum(np.sqrt(self.inner.diagonal()), TINY)
        return np.clip(self.inner / norms[:, None] / norms, -1.0, 1.0)


class GeometricMedian(PairwiseRule):
    """RFA: the point with the least weighted sum of distances to all deltas. Breakdown: f with half of the weight.

    Smoothed Weiszfeld: v = sum b_k delta_k / sum b_k, b_k = n_k / max(nu, norm(v - delta_k)), from the weighted mean
    on. v is always a mean of the deltas, so that its distances follow from the inner products. An iteration
    needs no pass over the vectors; it stops when v has converged.

    References:
        Pillutla et al., Robust Aggregation for Federated Learning, 2019, arXiv:1912.13445, Algorithm 2.
    """

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


class Krum(PairwiseRule):
    """The one delta that is closest to its K - f - 2 closest others. Breakdown point: 2 f + 2 < K.

    References:
        Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017,
        arXiv:1703.02757, Section 4.
    """

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2 f + 3."""
        return 2 * malicious + 3

    def weights(self, updates: Updates) -> np.ndarray:
        """Return 1 for the chosen client."""
        best = krum_order(self.inner, updates.assumed_malicious, updates.clients)[:1]
        return _equal_weights(best, len(updates.clients))


class MultiKrum(Krum):
    """The mean of the K - f deltas of the best Krum scores. Breakdown point: 2 f + 2 < K.

    References:
        Blanchard et al., Machine Learning with Adversaries, 2017, arXiv:1703.02757 (Multi-Krum, m = K - f).
    """

    def weights(self, updates: Updates) -> np.ndarray:
        """Return equal weights for the chosen clients."""
        count, malicious = len(updates.clients), updates.assumed_malicious
        return _equal_weights(krum_order(self.inner, malicious, updates.clients)[: count - malicious], count)


class Bulyan(Krum):
    """Krum chooses K - 2 f deltas one after the other; of each coordinate, the mean of those closest to the median.

    The mean is over K - 4 f deltas. Breakdown point: 4 f + 2 < K. The last choices have fewer candidates than Krum
    needs; then the closest neighbour alone decides.

    References:
        El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium, 2018, arXiv:1802.07927,
        Section 4.
    """

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

    def combine(self, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
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


class FoolsGold(PairwiseRule):
    """Clients whose updates point the same way over the rounds are taken for one attacker and get little weight.

    No breakdown point in f: the rule assumes that honest clients differ from each other, and fails against a single
    attacker. The weights are scaled to sum to 1 (the paper sums the scaled gradients, which would multiply a FedAvg
    step by K), and all coordinates count alike.

    References:
        Fung et al., Mitigating Sybils in Federated Learning Poisoning, 2018, arXiv:1808.04866, Algorithm 1.
    """

    def __init__(self, options: Any) -> None:
        """Start without a history."""
        super().__init__(options)
        self._history = np.zeros((0, 0), dtype=np.float32)

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2: a similarity needs two clients."""
        return 2

    def begin(self, updates: Updates) -> None:
        """Keep the clients of the round; in the first round allocate the histories `[clients, P]`."""
        super().begin(updates)
        self._clients = updates.clients
        if self._history.shape[1] != updates.parameters:
            self._history = zeros(updates.num_clients, updates.parameters)

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add this chunk to the clients' histories, and sum the inner products of the histories."""
        sums = self._history[self._clients, chunk] + deltas
        self._history[self._clients, chunk] = sums
        self._add(sums)

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the weights of Algorithm 1, scaled to sum to 1.

        The largest alpha becomes 1 there. If all clients are clones, each alpha is the largest.
        """
        similarity = self.cosines
        np.fill_diagonal(similarity, 0.0)
        highest = similarity.max(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            pardon = np.where(highest[:, None] < highest, highest[:, None] / highest, 1.0)  # v_i / v_j where v_j > v_i
        weights = np.clip(1 - (similarity * pardon).max(axis=1), 0.0, 1.0)
        weights[weights < 1e-9] = 0.0  # clones up to rounding errors, which the next line would amplify
        weights = weights / weights.max() if weights.any() else np.ones(len(weights))
        weights = np.minimum(weights, 0.99)
        with np.errstate(divide="ignore"):
            weights = np.clip(np.log(weights / (1 - weights)) + 0.5, 0.0, 1.0)
        return weights / max(weights.sum(), TINY)

    def state(self) -> dict[str, np.ndarray]:
        """Return the histories."""
        return {"foolsgold_history": self._history}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the histories of a checkpoint."""
        self._history = state["foolsgold_history"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FLTrustOptions:
    """Options of fltrust."""

    server_examples: int = setting(100, at_least=1, may_differ=Comparison.CLEAN_RUN)
    """fltrust: training examples that the server keeps for itself."""


class FLTrust(PairwiseRule):
    """The server trains on a few examples of its own and weighs each client by the angle to its own delta.

    The trust score is max(0, cosine with the server's delta); every delta is scaled to the norm of the server's. No
    breakdown point in f: the rule depends on the server's examples.

    References:
        Cao et al., FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, 2021, arXiv:2012.13995,
        Algorithm 2, Equations 2 to 4.
    """

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the normalised, scaled trust scores; the first update is the server's own and has weight 0."""
        trust = np.maximum(self.cosines[0, 1:], 0.0)
        scaled = trust / max(trust.sum(), TINY) * updates.norms[0] / np.maximum(updates.norms[1:], TINY)
        return np.concatenate([[0.0], scaled])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlameOptions:
    """Options of flame."""

    flame_noise: float = setting(0.001, at_least=0, may_differ=Comparison.CLEAN_RUN)
    """flame: standard deviation of its noise, as a share of the median norm of the updates."""


class Flame(PairwiseRule):
    """FLAME: exclude clients outside of the majority's cluster, clip the others to the median norm, add noise.

    HDBSCAN over the cosine distances gives the cluster, of at least K / 2 + 1 clients. The noise has the standard
    deviation flame_noise * median norm. Breakdown point: f < K / 2. The angles are those of the deltas: whole prompts
    share the global vector and have nearly the same direction. A lone cluster of HDBSCAN holds only the clients that
    leave it last: of ten honest clients with orthogonal updates it admits six.

    References:
        Nguyen et al., FLAME: Taming Backdoors in Federated Learning, 2022, arXiv:2101.02281, Algorithm 1.
    """

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2 f + 1, and at least 3: fewer clients form no cluster."""
        return max(honest_majority(malicious), 3)

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the clipped weights of the cluster."""
        from sklearn.cluster import HDBSCAN

        count = len(updates.clients)
        clusters = HDBSCAN(
            min_cluster_size=count // 2 + 1,
            min_samples=1,
            allow_single_cluster=True,
            metric="precomputed",
            copy=True,  # pyright: ignore[reportArgumentType] - scikit-learn's own docstring says bool
        )
        distances = 1 - self.cosines
        np.fill_diagonal(distances, 0.0)
        admitted = clusters.fit_predict(distances) >= 0
        bound = float(np.median(updates.norms))
        self.noise_std = self.options.flame_noise * bound
        return admitted * clip_factors(updates.norms, bound) / max(admitted.sum(), 1)


def add_inner_products(total: np.ndarray, rows: np.ndarray) -> None:
    """Add the inner products of all pairs of rows `[K, chunk]` float32 to `total` `[K, K]` float64, in place.

    Only the lower half is complete, since the products of a block of rows with a block above it are left out.

    BLAS computes each block in one thread, since the order in which it sums depends on the number of its threads; the
    blocks are spread over the cores of this process.
    """
    step = min(max(len(rows) // 4, ROWS), 1024)  # larger blocks need fewer passes, smaller ones are spread more evenly
    blocks = [slice(at, at + step) for at in range(0, len(rows), step)]
    pairs = [(first, second) for at, first in enumerate(blocks) for second in blocks[: at + 1]]
    buffer = np.empty((len(rows), min(COLUMNS, rows.shape[1])))
    with _blas().limit(limits=1, user_api="blas"):
        for at in range(0, rows.shape[1], COLUMNS):
            part = rows[:, at : at + COLUMNS]
            wide = buffer[:, : part.shape[1]]
            wide[:] = part

            def add(pair: tuple[slice, slice], wide: np.ndarray = wide) -> None:
                first, second = pair
                total[first, second] += wide[first] @ wide[second].T

            _in_parallel(add, pairs)


def _in_parallel(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `work` for each item, on all cores of this process."""
    with ThreadPoolExecutor(_cores()) as pool:
        collections.deque(pool.map(work, items), maxlen=0)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def squared_distances(inner: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
    """Return the squared distances of some of K vectors to all `[rows, K]` float64, from their inner products."""
    squares = inner.diagonal()
    return np.maximum(squares[rows, None] + squares - 2 * inner[rows], 0.0)


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

    _in_parallel(score, range(0, count, ROWS))
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
