"""Divide-and-conquer: a rule that finds outliers by the direction in which updates differ most.

Legend: K clients of the round, P parameters, f assumed malicious clients.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from fedprompt_mpi.rules.aggregator_base import TINY, Aggregator, Settings, Updates, honest_majority
from fedprompt_mpi.rules.registry import aggregators
from fedprompt_mpi.rules.setting import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivideAndConquerOptions:
    """Options of dnc."""

    dnc_iterations: int = setting(5, at_least=1, at_most=1000)
    """dnc: samples of the coordinates; a client must be no outlier in any of them."""
    dnc_coordinates: int = setting(10_000, at_least=1)
    """dnc: coordinates of a sample."""


@aggregators.register("dnc", options=DivideAndConquerOptions)
class DivideAndConquer(Aggregator):
    """DnC: the mean of the clients that are among the f most outlying in no sample of the coordinates.

    In each of `dnc_iterations` samples of `dnc_coordinates` coordinates a client's score is the square of the
    projection of its centred update onto the first right singular vector of all. Breakdown point: f < K / 2. If no
    client is left, the vector is unchanged.

    References:
        Shejwalkar and Houmansadr, Manipulating the Byzantine, NDSS 2021, Algorithm 2 (with c = 1: f are left out).
    """

    withstands = True
    mean_at: ClassVar[Settings | None] = {"assumed_malicious": 0}
    weighs_examples = False
    observes_first = True

    least_clients = staticmethod(honest_majority)

    def begin(self, updates: Updates) -> None:
        """Draw the coordinates."""
        rng, count = np.random.default_rng(updates.seed), min(self.options.dnc_coordinates, updates.parameters)
        self._samples = [
            np.sort(rng.choice(updates.parameters, count, replace=False)) for _ in range(self.options.dnc_iterations)
        ]
        self._seen = np.zeros((len(self._samples), len(updates.clients), count), dtype=np.float32)

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Keep the sampled coordinates of this chunk."""
        for seen, sample in zip(self._seen, self._samples, strict=True):
            first, last = np.searchsorted(sample, [chunk.start, chunk.stop])
            seen[:, first:last] = deltas[:, sample[first:last] - chunk.start]

    def weights(self, updates: Updates) -> np.ndarray:
        """Return equal weights for the clients that are left."""
        kept = np.ones(len(updates.clients), dtype=bool)
        for seen in self._seen:
            order = np.lexsort((updates.clients, outlier_scores(seen)))
            kept[order[len(order) - updates.assumed_malicious :]] = False
        del self._seen
        return kept / max(int(kept.sum()), 1)


def outlier_scores(deltas: np.ndarray) -> np.ndarray:
    """Return the squared projections of deltas `[K, n]` onto the direction in which they differ most `[K]`, up to 1.

    The left singular vectors are the eigenvectors of the centred inner products: a small matrix.
    """
    centred = deltas.astype(np.float64) - deltas.mean(axis=0, dtype=np.float64)
    values, vectors = np.linalg.eigh(np.einsum("in,jn->ij", centred, centred))
    scores = values[-1] * vectors[:, -1] ** 2
    return (scores / max(scores.max(), TINY)).round(9)  # equal updates have equal scores but for their last bits
