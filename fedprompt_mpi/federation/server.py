"""Updates -> next global vector."""

import numpy as np

from fedprompt_mpi.comm.channel import Gathered
from fedprompt_mpi.comm.timing import Timing
from fedprompt_mpi.federation.aggregate import Aggregator


class Server:
    """The global vector, and the rule that moves it. Every rank has one; only rank 0's rule runs."""

    def __init__(self, vector: np.ndarray, aggregator: Aggregator) -> None:
        """Start from `vector` `[P]` float32, which is changed in place."""
        self.vector = vector
        self._aggregator = aggregator

    def apply(self, gathered: Gathered, timing: Timing, *, is_root: bool) -> None:
        """Take in a round's updates, piece by piece.

        Every rank calls this, since the pieces travel while they are asked for; that time is the gather's.
        """
        weights = gathered.headers["num_examples"].astype(np.float64)
        for piece, deltas in gathered.blocks:
            if is_root:
                with timing.phase("aggregate"):
                    self.vector[piece] += self._aggregator(deltas, weights)
