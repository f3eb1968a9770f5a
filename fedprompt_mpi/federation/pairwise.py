"""Rules that compare whole updates: by distance (RFA, Krum, Bulyan) or by angle (FoolsGold, FLTrust, FLAME).

They look at every piece first and keep the inner products of all pairs: distances, angles and norms follow from
those, and no pass over the vectors is needed to try out a mean of them.

Legend: K clients of the round, P parameters, f assumed malicious clients.
"""

import numpy as np

from fedprompt_mpi.config import FederationConfig
from fedprompt_mpi.federation.room import room_for
from fedprompt_mpi.federation.rule import TINY, Aggregator, Updates, clip_factors, honest_majority, middle


class PairwiseRule(Aggregator):
    """Base of the rules that compare updates: the inner products of all pairs, added up piece by piece."""

    looks_first = True

    def begin(self, updates: Updates) -> None:
        """Start with inner products of nothing."""
        self.inner = np.zeros((len(updates.clients), len(updates.clients)))

    def look(self, piece: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add this piece's inner products."""
        self.inner += inner_products(deltas)

    @property
    def squared_distances(self) -> np.ndarray:
        """`[K, K]` float64."""
        squares = self.inner.diagonal()
        return np.maximum(squares[:, None] + squares - 2 * self.inner, 0.0)

    @property
    def cosines(self) -> np.ndarray:
        """`[K, K]` float64 in [-1, 1]; that of a zero delta with any other is 0."""
        norms = np.maximum(np.sqrt(self.inner.diagonal()), TINY)
        return np.clip(self.inner / norms[:, None] / norms, -1.0, 1.0)


class GeometricMedian(PairwiseRule):
    """RFA: the point with the least weighted sum of distances to all deltas. Breakdown: f with half of the weight.

    Smoothed Weiszfeld: v = sum b_k delta_k / sum b_k, b_k = n_k / max(nu, norm(v - delta_k)), from the weighted mean
    on. v is always a mean of the deltas, so that its distances follow from the inner products, and iterating costs
    no pass over the vectors; so it goes on until v stands still.

    References:
        Pillutla et al., Robust Aggregation for Federated Learning, 2019, arXiv:1912.13445, Algorithm 2.
    """

    smoothing = 1e-6
    iterations = 1000

    least_clients = staticmethod(honest_majority)  # as if clients held equally many examples

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return the shares that the deltas have in their geometric median."""
        weights = updates.num_examples / updates.num_examples.sum()
        shares = weights
        for _ in range(self.iterations):
            products = np.einsum("ij,j->i", self.inner, shares)
            squares = self.inner.diagonal() - 2 * products + np.einsum("i,i", shares, products)
            betas = weights / np.maximum(np.sqrt(np.maximum(squares, 0.0)), self.smoothing)
            step = betas / betas.sum() - shares
            shares = shares + step
            if np.einsum("i,ij,j", step, self.inner, step) < (0.001 * self.smoothing) ** 2:  # v stands still
                break
        return shares


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

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return 1 for the chosen client."""
        best = krum_order(self.squared_distances, updates.assumed_malicious)[:1]
        return _equal_shares(best, len(updates.clients))


class MultiKrum(Krum):
    """The mean of the K - f deltas of the best Krum scores. Breakdown point: 2 f + 2 < K.

    References:
        Blanchard et al., Machine Learning with Adversaries, 2017, arXiv:1703.02757 (Multi-Krum, m = K - f).
    """

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return equal shares for the chosen clients."""
        count, malicious = len(updates.clients), updates.assumed_malicious
        return _equal_shares(krum_order(self.squared_distances, malicious)[: count - malicious], count)


class Bulyan(Krum):
    """Krum chooses K - 2 f deltas one after the other; of each coordinate, the mean of those closest to the median.

    So many are averaged as are left when 2 f more are taken away: K - 4 f. Breakdown point: 4 f + 2 < K. Toward
    the end fewer candidates are left than Krum asks for; then it goes by the closest one.

    References:
        El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium, 2018, arXiv:1802.07927,
        Section 4.
    """

    coordinate_wise = True

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 4 f + 3."""
        return 4 * malicious + 3

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return equal shares for the chosen clients."""
        malicious, distances = updates.assumed_malicious, self.squared_distances
        left = list(range(len(distances)))
        chosen = []
        while len(chosen) < len(distances) - 2 * malicious:
            best = krum_order(distances[np.ix_(left, left)], malicious)[0]
            chosen.append(left.pop(int(best)))
        self._averaged = len(chosen) - 2 * malicious
        return _equal_shares(np.array(chosen), len(distances))

    def combine(self, deltas: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Return, of each column's chosen rows, the mean of those closest to their median."""
        ordered = np.sort(deltas[shares > 0], axis=0).astype(np.float64)
        count, averaged, median = len(ordered), self._averaged, middle(ordered)
        # the closest ones to the median stand side by side: find the window that reaches least far from it
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
    """Clients whose updates have pointed the same way over the rounds are taken for one attacker, and share its say.

    No breakdown point in f: it takes honest clients for unlike each other, and fails where one attacker stands alone.
    The shares are scaled to sum to 1 (the paper adds the scaled gradients up, which would multiply a FedAvg step by
    K), and all coordinates count alike.

    References:
        Fung et al., Mitigating Sybils in Federated Learning Poisoning, 2018, arXiv:1808.04866, Algorithm 1.
    """

    def __init__(self, config: FederationConfig) -> None:
        """Start without a history."""
        super().__init__(config)
        self._history = np.zeros((0, 0), dtype=np.float32)

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2: there must be somebody to be like."""
        return 2

    def begin(self, updates: Updates) -> None:
        """Note whose history is looked at; in the first round make room for everybody's, `[clients, P]`."""
        super().begin(updates)
        self._clients = updates.clients
        if self._history.shape[1] != updates.parameters:
            self._history = room_for(self.config.clients, updates.parameters)

    def look(self, piece: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add this piece to the clients' histories, and their inner products up."""
        sums = self._history[self._clients, piece] + deltas
        self._history[self._clients, piece] = sums
        self.inner += inner_products(sums)

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return the shares of Algorithm 1, scaled to sum to 1."""
        similarity = self.cosines
        np.fill_diagonal(similarity, 0.0)
        highest = similarity.max(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            pardon = np.where(highest[:, None] < highest, highest[:, None] / highest, 1.0)  # v_i / v_j where v_j > v_i
        shares = np.clip(1 - (similarity * pardon).max(axis=1), 0.0, 1.0)
        shares[shares < 1e-9] = 0.0  # clones, but for rounding, which the next line would blow up
        shares /= max(shares.max(), TINY)
        shares = np.minimum(shares, 0.99)
        with np.errstate(divide="ignore"):
            shares = np.clip(np.log(shares / (1 - shares)) + 0.5, 0.0, 1.0)
        return shares / max(shares.sum(), TINY)

    def state(self) -> dict[str, np.ndarray]:
        """Return the histories."""
        return {"foolsgold_history": self._history}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take the histories back."""
        self._history = state["foolsgold_history"]


class FLTrust(PairwiseRule):
    """The server trains on a few examples of its own, and trusts a client as far as its delta points the same way.

    Trust is max(0, cosine with the server's delta); every delta is scaled to the norm of the server's. No breakdown
    point in f: it is as good as the server's examples are.

    References:
        Cao et al., FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, 2021, arXiv:2012.13995,
        Algorithm 2, Equations 2 to 4.
    """

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return the trust scores' shares, scaled; the first update is the server's own, and has none."""
        trust = np.maximum(self.cosines[0, 1:], 0.0)
        scaled = trust / max(trust.sum(), TINY) * updates.norms[0] / np.maximum(updates.norms[1:], TINY)
        return np.concatenate([[0.0], scaled])


class Flame(PairwiseRule):
    """FLAME: leave out whoever is no part of the majority's cluster, clip the others to the median norm, add noise.

    The cluster is HDBSCAN's over the cosine distances, of at least K / 2 + 1 clients; the noise has the standard
    deviation flame_noise * median norm. Breakdown point: f < K / 2. Angles are those of the deltas: whole prompts of
    one round share the global vector, and hardly differ in theirs. HDBSCAN counts to a lone cluster only the clients
    that leave it last: of ten honest ones whose updates are at right angles it admits six.

    References:
        Nguyen et al., FLAME: Taming Backdoors in Federated Learning, 2022, arXiv:2101.02281, Algorithm 1.
    """

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2 f + 1, and at least 3: fewer make no cluster."""
        return max(honest_majority(malicious), 3)

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return the clipped shares of the cluster."""
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
        self.noise_std = self.config.flame_noise * bound
        return admitted * clip_factors(updates.norms, bound) / max(admitted.sum(), 1)


def inner_products(rows: np.ndarray) -> np.ndarray:
    """Return the inner products `[K, K]` float64 of all pairs of rows `[K, piece]` float32.

    By einsum, not by matrix product: BLAS adds in an order that depends on its number of threads.
    """
    products = np.empty((len(rows), len(rows)))
    for i, row in enumerate(rows):
        for j in range(i + 1):
            products[i, j] = products[j, i] = np.einsum("p,p", row, rows[j], dtype=np.float64)
    return products


def krum_scores(squared_distances: np.ndarray, malicious: int) -> np.ndarray:
    """Return the sum of each client's K - f - 2 smallest squared distances to others (at least one) `[K]`."""
    count = len(squared_distances)
    neighbours = max(count - malicious - 2, 1)
    return np.sort(squared_distances, axis=1)[:, 1 : 1 + neighbours].sum(axis=1)  # the first is its own, 0


def krum_order(squared_distances: np.ndarray, malicious: int) -> np.ndarray:
    """Return the clients from the best Krum score to the worst `[K]` int64.

    Of two with the same score, as each other's only neighbour has, the one nearer to all comes first: not the one
    that happens to be listed first.
    """
    return np.lexsort((squared_distances.sum(axis=1), krum_scores(squared_distances, malicious)))


def _equal_shares(chosen: np.ndarray, count: int) -> np.ndarray:
    shares = np.zeros(count)
    shares[chosen] = 1 / len(chosen)
    return shares
