"""The base class of all aggregation rules.

A rule returns the weight of each client's delta (`weights`) and combines one chunk of the deltas (`combine`). A rule
that is linear in the deltas overrides only the first, a rule that works by coordinate only the second. A rule that
must see all updates before it can weigh them gets every chunk in `observe` first, and keeps sums; `aggregate` shows the
order of the calls.

Legend: K clients of the round, P parameters, f assumed malicious clients, s the weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

Settings = Mapping[str, Any]
"""Values of settings of one section, by name."""
BLOCK = 2**15
"""Numbers at a time, so that intermediate results stay in the cache."""
TINY = 1e-300
LARGEST_NORM = 1e18
"""About the root of the largest float32. Updates with a larger norm are rejected: their sums would overflow."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """The headers of a round's updates, all finite, in client order."""

    clients: np.ndarray
    """`[K]` int64 ids. Under FLTrust the server's own update comes first; its id is the number of clients."""
    num_examples: np.ndarray
    """`[K]` float64, positive."""
    norms: np.ndarray
    """`[K]` float64, Euclidean, of the deltas."""
    parameters: int
    """P."""
    assumed_malicious: int = 0
    """f, or as many as the remaining clients allow."""
    num_clients: int = 0
    """Clients of the whole federation."""
    seed: int = 0
    """Of the random choices that a rule makes in this round."""


class Aggregator:
    """Base class of the rules. It is the mean, weighted by num_examples."""

    coordinate_wise = False
    """True if the rule may take another client in each coordinate, so that a client has no weight."""
    observes_first = False
    """True if `observe` must get all chunks before `weights` is called."""
    weighs_examples = True
    """False if clients count alike, however many examples they have."""
    trains_itself = False
    """True if the server trains an update of its own, which comes first and has the number of clients as its id."""
    withstands = False
    """True if the result stays near the honest updates with f others, however far these are."""
    keeps_updates = False
    """True if it keeps all updates, on disk if they are large."""
    mean_at: ClassVar[Settings | None] = None
    """Settings of the section `federation` under which it is the mean of the updates; None if there are none."""
    scales_updates = False
    """True if a weight holds a scale too, by which the rule bounds an update or sets its length."""
    bounded_by: ClassVar[str | None] = None
    """Setting of the section `federation` that holds the norm to which each update is scaled, if the rule has one: its
    weights are then those of unscaled updates (of norm 0), times `clip_factors`."""
    noise_std = 0.0
    """Standard deviation of the rule's own normal noise; `weights` sets it where it depends on the round."""

    def __init__(self, options: Any) -> None:
        """Keep the options: an object with the fields of the rule's own options class."""
        self.options = options

    @property
    def bound(self) -> float | None:
        """Norm to which each update is scaled; None if they are not.

        A bound is known to everybody before a round. Updates with one are summed in whole numbers of a unit that
        follows from it and not from the updates, whoever adds them up.
        """
        return None if self.bounded_by is None else getattr(self.options, self.bounded_by)

    def bounded_factors(self, weights: np.ndarray, norms: np.ndarray, rounding: float) -> np.ndarray:
        """Return the factors `[K]` float64 with which a bounded rule adds up deltas in whole numbers.

        Args:
            weights: `[K]`, of updates that are not scaled.
            norms: `[K]`, of the deltas.
            rounding: by how much rounding may lengthen a weighted delta.
        """
        assert self.bound is not None
        return weights * clip_factors(norms, self.bound)

    @classmethod
    def needs_headers_only(cls) -> bool:
        """Return True if the weights follow from the headers and the result is a sum, which MPI may compute."""
        return not cls.observes_first and cls.is_weighted_sum()

    @classmethod
    def is_weighted_sum(cls) -> bool:
        """Return True if the result is the sum of the clients' deltas by `weights`, and nothing else."""
        return cls.combine is Aggregator.combine

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return the K that the rule needs to withstand f malicious clients; 1 here: the mean withstands none."""
        return 1

    @classmethod
    def most_malicious(cls, clients: int) -> int | None:
        """Return the largest f that a number of clients allows; None if they are too few even for f = 0."""
        return max((f for f in range(clients + 1) if cls.least_clients(f) <= clients), default=None)

    def begin(self, updates: Updates) -> None:
        """Prepare for a round."""

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """See one chunk of the deltas before `weights` is called.

        Args:
            chunk: the coordinates.
            deltas: `[K, chunk]` float32.
            vector: `[chunk]` float32 of the global vector.
        """

    def observed(self) -> bool:
        """Take note that all chunks were observed; return True to observe them once more."""
        return False

    def weights(self, updates: Updates) -> np.ndarray:
        """Return the weight of each client's delta `[K]` float64; a weight of 0 excludes the client."""
        return updates.num_examples / updates.num_examples.sum()

    def combine(self, chunk: slice, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Combine one chunk of all clients' deltas.

        Args:
            chunk: the coordinates.
            deltas: `[K, chunk]` float32, local minus global, in client order.
            weights: `[K]` float64, as `weights` returned them.

        Returns:
            `[chunk]` float64: sum s_k delta_k. The sum runs in client order, so that it does not depend on how clients
            are spread over ranks.
        """
        total = np.zeros(deltas.shape[1])
        product = np.empty(min(len(total), BLOCK))
        for at in range(0, len(total), BLOCK):
            part = total[at : at + BLOCK]
            for weight, delta in zip(weights, deltas, strict=True):
                if weight != 0:
                    part += np.multiply(delta[at : at + BLOCK], weight, out=product[: len(part)])
        return total

    def state_shapes(self, clients: int, size: int) -> dict[str, tuple[int, ...]]:
        """Return names and shapes of `state` once a round is done, for a number of clients and P = `size`."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """Return the state that the rule carries from round to round, for the checkpoint."""
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the state that `state` returned."""


def aggregate(
    rule: Aggregator, updates: Updates, deltas: np.ndarray, vector: np.ndarray, columns: int | None = None
) -> np.ndarray:
    """Return what a rule makes of deltas that are all here.

    Args:
        rule: the rule.
        updates: the headers.
        deltas: `[K, P]` float32.
        vector: `[P]` float32, the global one.
        columns: of a chunk; None for one chunk.

    Returns:
        `[P]` float64.
    """
    size = deltas.shape[1]
    chunks = [slice(at, min(at + (columns or size), size)) for at in range(0, size, columns or size)]
    rule.begin(updates)
    again = rule.observes_first
    while again:
        for chunk in chunks:
            rule.observe(chunk, deltas[:, chunk], vector[chunk])
        again = rule.observed()
    weights = rule.weights(updates)
    return np.concatenate([rule.combine(chunk, deltas[:, chunk], weights) for chunk in chunks])


def honest_majority(malicious: int) -> int:
    """Return 2 f + 1, the least number of clients among which f are a minority."""
    return 2 * malicious + 1


def euclidean_norm(vector: np.ndarray) -> float:
    """Return the norm of a vector `[P]` float32, summed in float64 in a fixed order (BLAS has none)."""
    return float(np.sqrt(np.einsum("i,i", vector, vector, dtype=np.float64)))


def clip_factors(norms: np.ndarray, bound: float | np.ndarray) -> np.ndarray:
    """Return min(1, bound / norm) for each of K norms `[K]` float64: scales a delta to at most the bound."""
    return bound / np.maximum(norms, np.maximum(bound, TINY))


def middle(ordered: np.ndarray) -> np.ndarray:
    """Return the median `[chunk]` float64 of sorted columns `[K, chunk]`; for an even K the mean of the middle two."""
    return (ordered[(len(ordered) - 1) // 2].astype(np.float64) + ordered[len(ordered) // 2]) / 2
