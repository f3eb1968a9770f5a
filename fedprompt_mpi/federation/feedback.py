"""What a short wire format leaves behind is kept by its sender and sent later: error feedback.

Each client adds to its update what its earlier ones lost, sends what the format can carry of the sum, and keeps the
rest. The server does so with the step that the global vector takes. So errors do not add up over the rounds.

Legend: K clients, P parameters.

References:
    Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014; Karimireddy et al., Error Feedback Fixes SignSGD
    and other Gradient Compression Schemes, 2019, arXiv:1901.09847 (Algorithm 2); Tang et al., DoubleSqueeze, 2019,
    arXiv:1905.05957 (both ways).
"""

import numpy as np

from fedprompt_mpi.comm.channel import HEADER, Channel
from fedprompt_mpi.comm.wire import Wire
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.federation.room import room_for
from fedprompt_mpi.federation.rule import LARGEST_NORM, euclidean_norm

RESIDUALS = "client_residuals"


def send_with_feedback(values: np.ndarray, residual: np.ndarray, wire: Wire) -> None:
    """Change `values` `[P]` float32 to what is sent, and `residual` `[P]` float32 to what is kept; both in place.

    What the server will drop goes as it is and leaves the residual alone.
    """
    if not euclidean_norm(values) <= LARGEST_NORM:
        return
    residual += values
    values[:] = wire.quantise(residual)
    residual -= values


class ClientFeedback:
    """The residuals of the clients that live on this rank."""

    def __init__(self, wire: Wire, clients: int, channel: Channel) -> None:
        """Start with nothing left behind."""
        self._wire, self._channel, self._clients = wire, channel, clients
        self._residuals: dict[int, np.ndarray] = {}

    def send(self, client: int, delta: np.ndarray) -> None:
        """Change a client's delta `[P]` float32 in place to what is sent of it."""
        if not self._wire.exact:
            send_with_feedback(delta, self._residuals.setdefault(client, np.zeros_like(delta)), self._wire)

    def collect(self, size: int) -> dict[str, np.ndarray]:
        """Return all clients' residuals `[K, P]` on rank 0, by name, for the checkpoint; every rank calls this."""
        if self._wire.exact:
            return {}
        homes = home_ranks(self._clients, self._channel.size)
        own = np.flatnonzero(homes == self._channel.rank)
        headers = np.zeros(len(own), dtype=HEADER)
        rows = np.zeros((len(own), size), dtype=np.float32)
        for row, client in zip(rows, own.tolist(), strict=True):
            row += self._residuals.get(client, 0.0)
        everyone = room_for(self._clients if self._channel.rank == 0 else 0, size)
        with self._channel.timing.mute():
            gathered = self._channel.gather(headers, rows, np.bincount(homes, minlength=self._channel.size))
            for piece, block in gathered.blocks:
                everyone[:, piece] = block
        return {RESIDUALS: everyone}

    def restore(self, state: dict[str, np.ndarray], size: int) -> None:
        """Take back what `collect` returned, which rank 0 alone has; every rank calls this."""
        if self._wire.exact:
            return
        homes = home_ranks(self._clients, self._channel.size)
        for client in range(self._clients):
            row = state[RESIDUALS][client].copy() if self._channel.rank == 0 else np.empty(size, dtype=np.float32)
            with self._channel.timing.mute():
                self._channel.broadcast(row, client)
            if homes[client] == self._channel.rank:
                self._residuals[client] = row
