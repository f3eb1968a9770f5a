"""What a rule of aggregation is: who gets what share, and what becomes of one piece of the vector.

A rule decides in `weigh` how much of each client's delta it takes, and in `combine` what becomes of one piece of
the vector. Rules that are linear in the deltas need only the first, rules that go by coordinate only the second. A
rule that must see all of the updates before it decides `look`s at every piece first, and keeps sums.

Legend: K clients of the round, P parameters, f assumed malicious clients, s the shares.
"""

import dataclasses

import numpy as np

from fedprompt_mpi.config import FederationConfig

TINY = 1e-300
LARGEST_NORM = 1e18
"""About the root of the largest float32: an update beyond it is not let in, since sums of such are not finite."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """What the server knows of a round's updates, all finite, in client order."""

    clients: np.ndarray
    """`[K]` int64 ids; under FLTrust the server's own update comes first, with the number of clients as its id."""
    num_examples: np.ndarray
    """`[K]` float64, positive."""
    norms: np.ndarray
    """`[K]` float64, Euclidean, of the deltas."""
    parameters: int
    """P."""
    assumed_malicious: int = 0
    """f, or as many as the clients that are left allow."""


class Aggregator:
    """Base of the rules; as it stands it is the mean, weighted by num_examples."""

    coordinate_wise = False
    """Whether the rule takes another client's delta in each coordinate, so that a client has no share."""
    looks_first = False
    """Whether `look` wants to see all pieces before `weigh` is asked."""
    noise_std = 0.0
    """Standard deviation of the normal noise that belongs to the rule; set by `weigh` where it depends on the round."""

    def __init__(self, config: FederationConfig) -> None:
        """Take the rule's settings."""
        self.config = config

    @classmethod
    def needs_headers_only(cls) -> bool:
        """Tell whether shares come from norms and counts alone and the rest is a sum, so that MPI may add it up."""
        return not cls.looks_first and not cls.coordinate_wise and cls.combine is Aggregator.combine

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return the K that the rule needs to withstand f malicious clients; here 1, since it withstands none."""
        return 1

    @classmethod
    def most_malicious(cls, clients: int) -> int | None:
        """Return the largest f that so many clients allow; None if they are too few even for f = 0."""
        return max((f for f in range(clients + 1) if cls.least_clients(f) <= clients), default=None)

    def begin(self, updates: Updates) -> None:
        """Prepare for a round."""

    def look(self, piece: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """See one piece ahead of `weigh`.

        Args:
            piece: which coordinates.
            deltas: `[K, piece]` float32.
            vector: `[piece]` float32 of the global vector.
        """

    def weigh(self, updates: Updates) -> np.ndarray:
        """Return the factor of each client's delta `[K]` float64; 0 leaves it out."""
        return updates.num_examples / updates.num_examples.sum()

    def combine(self, deltas: np.ndarray, shares: np.ndarray) -> np.ndarray:
        """Combine one piece of all clients' deltas.

        Args:
            deltas: `[K, piece]` float32, local minus global, in client order.
            shares: `[K]` float64, what `weigh` returned.

        Returns:
            `[piece]` float64: sum s_k delta_k, added in client order, so that the result does not depend on how
            clients are spread over ranks.
        """
        total = np.zeros(deltas.shape[1])
        for share, delta in zip(shares, deltas, strict=True):
            if share != 0:
                total += share * delta
        return total

    def state(self) -> dict[str, np.ndarray]:
        """Return what the rule remembers from round to round, for the checkpoint."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` returned."""


def honest_majority(malicious: int) -> int:
    """Return 2 f + 1, the least number of clients of which f are a minority."""
    return 2 * malicious + 1


def euclidean_norm(vector: np.ndarray) -> float:
    """Return the norm of a vector `[P]` float32, added up in float64 and, unlike by BLAS, always in the same order."""
    return float(np.sqrt(np.einsum("i,i", vector, vector, dtype=np.float64)))


def clip_factors(norms: np.ndarray, bound: float) -> np.ndarray:
    """Return min(1, bound / norm) for each of K norms `[K]` float64: what scales a delta to at most the bound."""
    return np.minimum(1, bound / np.maximum(norms, TINY))


def middle(ordered: np.ndarray) -> np.ndarray:
    """Return the median `[piece]` float64 of columns in order `[K, piece]`: of an even K the mean of the middle two."""
    return (ordered[(len(ordered) - 1) // 2].astype(np.float64) + ordered[len(ordered) // 2]) / 2
