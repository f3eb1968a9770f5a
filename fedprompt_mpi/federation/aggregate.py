"""How the server makes one update of the clients' updates.

Legend: K clients of the round, P parameters.
"""

from typing import Protocol

import numpy as np


class Aggregator(Protocol):
    """A rule that works on any piece of the vector by itself."""

    def __call__(self, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Combine one piece of all clients' deltas.

        Args:
            deltas: `[K, piece]` float32, local minus global, in client order.
            weights: `[K]` float64, positive: num_examples of each client.

        Returns:
            `[piece]` float64.
        """
        ...


class FedAvg:
    """The mean of the deltas, weighted by the clients' numbers of examples: sum n_k delta_k / sum n_k.

    Summed in client order in float64, so that the result does not depend on how clients are spread over ranks.

    References:
        McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017,
        arXiv:1602.05629, Algorithm 1.
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Equation 4.
    """

    def __call__(self, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the weighted mean; see `Aggregator`."""
        shares = weights / weights.sum()
        total = np.zeros(deltas.shape[1])
        for share, delta in zip(shares, deltas, strict=True):
            total += share * delta
        return total


AGGREGATORS: dict[str, type[FedAvg]] = {"fedavg": FedAvg}
