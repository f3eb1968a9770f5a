"""Rules that compare updates by their angles: FoolsGold, FLTrust, FLAME, FreqFed.

Legend: K clients of the round, P parameters, f assumed malicious clients.
"""

import dataclasses
from typing import Any

import numpy as np

from fedprompt_mpi.rules.aggregator_base import TINY, Aggregator, Updates, clip_factors, honest_majority
from fedprompt_mpi.rules.pairwise import PairwiseRule, add_inner_products, cosines_of
from fedprompt_mpi.rules.registry import aggregators
from fedprompt_mpi.rules.setting import setting
from fedprompt_mpi.rules.spill import zeros


@aggregators.register("foolsgold")
class FoolsGold(PairwiseRule):
    """Clients whose updates point the same way over the rounds are taken for one attacker and get little weight.

    No breakdown point in f: the rule assumes that honest clients differ from each other, and fails against a single
    attacker. The weights are scaled to sum to 1 (the paper sums the scaled gradients, which would multiply a FedAvg
    step by K), and all coordinates count alike.

    References:
        Fung et al., Mitigating Sybils in Federated Learning Poisoning, 2018, arXiv:1808.04866, Algorithm 1.
    """

    withstands = True
    weighs_examples = False

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

    def state_shapes(self, clients: int, size: int) -> dict[str, tuple[int, ...]]:
        """Return that of the histories."""
        return {"foolsgold_history": (clients, size)}

    def state(self) -> dict[str, np.ndarray]:
        """Return the histories."""
        return {"foolsgold_history": self._history}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the histories of a checkpoint."""
        self._history = state["foolsgold_history"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FLTrustOptions:
    """Options of fltrust."""

    server_examples: int = setting(100, at_least=1)
    """fltrust: training examples that the server keeps for itself."""


@aggregators.register("fltrust", options=FLTrustOptions)
class FLTrust(PairwiseRule):
    """The server trains on a few examples of its own and weighs each client by the angle to its own delta.

    The trust score is max(0, cosine with the server's delta); every delta is scaled to the norm of the server's. No
    breakdown point in f: the rule depends on the server's examples.

    References:
        Cao et al., FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, 2021, arXiv:2012.13995,
        Algorithm 2, Equations 2 to 4.
    """

    withstands = scales_updates = True
    weighs_examples = False
    trains_itself = True

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the normalised, scaled trust scores; the first update is the server's own and has weight 0."""
        trust = np.maximum(self.cosines[0, 1:], 0.0)
        scaled = trust / max(trust.sum(), TINY) * updates.norms[0] / np.maximum(updates.norms[1:], TINY)
        return np.concatenate([[0.0], scaled])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlameOptions:
    """Options of flame."""

    flame_noise: float = setting(0.001, at_least=0)
    """flame: standard deviation of its noise, as a share of the median norm of the updates."""


@aggregators.register("flame", options=FlameOptions)
class Flame(PairwiseRule):
    """FLAME: exclude clients outside of the majority's cluster, clip the others to the median norm, add noise.

    HDBSCAN over the cosine distances gives the cluster, of at least K / 2 + 1 clients. The noise has the standard
    deviation flame_noise * median norm. Breakdown point: f < K / 2. The angles are those of the deltas: whole prompts
    share the global vector and have nearly the same direction. A lone cluster of HDBSCAN holds only the clients that
    leave it last: of ten honest clients with orthogonal updates it admits six.

    References:
        Nguyen et al., FLAME: Taming Backdoors in Federated Learning, 2022, arXiv:2101.02281, Algorithm 1.
    """

    withstands = scales_updates = True
    weighs_examples = False

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2 f + 1, and at least 3: fewer clients form no cluster."""
        return max(honest_majority(malicious), 3)

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the clipped weights of the cluster."""
        admitted = hdbscan(cosine_distances(self.inner), updates.clients, len(updates.clients) // 2 + 1) >= 0
        bound = float(np.median(updates.norms))
        self.noise_std = self.options.flame_noise * bound
        return admitted * clip_factors(updates.norms, bound) / max(admitted.sum(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FreqFedOptions:
    """Options of freqfed."""

    freqfed_share: float = setting(0.5, above=0, at_most=1)
    """freqfed: share of the frequencies, from the lowest on, that are compared."""


@aggregators.register("freqfed", options=FreqFedOptions)
class FreqFed(Aggregator):
    """The weighted mean of the largest cluster of updates by their low frequencies.

    The cosine transform (type II, orthonormal) of each whole update is cut to its lowest `freqfed_share`; HDBSCAN over
    the cosine distances of what is left gives the clusters. If it finds none, nobody is left out. No breakdown point is
    known; malicious clients win if they are the largest cluster.

    References:
        Fereidooni et al., FreqFed: A Frequency Analysis-Based Approach for Mitigating Poisoning Attacks in Federated
        Learning, NDSS 2024, arXiv:2312.04432, Algorithm 1. The share that is kept is our choice.
    """

    withstands = True
    keeps_updates = True
    observes_first = True

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 2 f + 1, and at least 3: fewer clients form no cluster."""
        return max(honest_majority(malicious), 3)

    def begin(self, updates: Updates) -> None:
        """Allocate room for the whole updates."""
        self._deltas = zeros(len(updates.clients), updates.parameters)

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Keep this chunk."""
        self._deltas[:, chunk] = deltas

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the weights of the largest cluster."""
        from scipy.fft import dct

        count = max(1, round(self.options.freqfed_share * self._deltas.shape[1]))
        inner, low = np.zeros((len(self._deltas),) * 2), self._deltas[:, :count]
        for row, delta in zip(low, self._deltas, strict=True):
            row[:] = np.asarray(dct(delta, norm="ortho"))[:count]  # in place of the update, which nobody needs any more
        add_inner_products(inner, low)
        del self._deltas
        distances = cosine_distances(np.tril(inner) + np.tril(inner, -1).T)
        labels = hdbscan(distances, updates.clients, min_cluster_size=2)
        sizes = np.bincount(labels[labels >= 0], minlength=1)
        kept = updates.num_examples * (labels == sizes.argmax() if sizes.any() else True)
        return kept / kept.sum()


def cosine_distances(inner: np.ndarray) -> np.ndarray:
    """Return 1 - cosine of all pairs `[K, K]`, 0 of a delta with itself, from their inner products."""
    distances = 1 - cosines_of(inner)
    np.fill_diagonal(distances, 0.0)
    return distances


def hdbscan(distances: np.ndarray, clients: np.ndarray, min_cluster_size: int) -> np.ndarray:
    """Return the cluster of each of K clients `[K]` int64, -1 for none.

    Args:
        distances: `[K, K]`. They are rounded: which of two equal ones comes first must not depend on their last bits.
        clients: `[K]` int64 ids, in whose order the clusters grow.
        min_cluster_size: of the smallest one that counts.
    """
    from sklearn.cluster import HDBSCAN

    order = np.argsort(clients)
    clusters = HDBSCAN(
        min_cluster_size=min_cluster_size,
        min_samples=1,
        allow_single_cluster=True,
        metric="precomputed",
        copy=True,  # pyright: ignore[reportArgumentType] - scikit-learn's own docstring says bool
    )
    labels = np.empty(len(clients), dtype=np.int64)
    labels[order] = clusters.fit_predict(distances[np.ix_(order, order)].round(9))
    return labels
