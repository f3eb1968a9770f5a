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
    """Change `values` `[P]` float32 to what is sent, and `residual` `[P]` float32 to what is kept; both in place."""
    residual += values
    values[:] = wire.quantise(residual)
    residual -= values


class ClientFeedback:
    """The residuals of the clients that live on this rank, `[k, P]` float32."""

    def __init__(self, wire: Wire, clients: int, size: int, channel: Channel) -> None:
        """Start with nothing left behind.

        Args:
            wire: the format in which deltas travel.
            clients: K.
            size: P.
            channel: between the ranks.
        """
        self._wire, self._channel, self._size = wire, channel, size
        self._homes = home_ranks(clients, channel.size)
        self._first, own = int((self._homes < channel.rank).sum()), int((self._homes == channel.rank).sum())
        self._residuals = room_for(0 if wire.exact else own, size)

    def send(self, client: int, delta: np.ndarray) -> None:
        """Change a client's delta `[P]` float32 in place to what is sent of it.

        What the server will drop goes as it is and leaves the residual alone. The server's own update (FLTrust), which
        stays on rank 0 but is packed like the others, leaves nothing behind.
        """
        if self._wire.exact or not euclidean_norm(delta) <= LARGEST_NORM:
            return
        if client == len(self._homes):
            delta[:] = self._wire.quantise(delta)
        else:
            send_with_feedback(delta, self._residuals[client - self._first], self._wire)

    def collect(self) -> dict[str, np.ndarray]:
        """Return all clients' residuals `[K, P]` on rank 0, by name, for the checkpoint; every rank calls this."""
        if self._wire.exact:
            return {}
        headers = np.zeros(len(self._residuals), dtype=HEADER)
        counts = np.bincount(self._homes, minlength=self._channel.size)
        everyone = room_for(len(self._homes) if self._channel.rank == 0 else 0, self._size)
        with self._channel.timing.mute():
            gathered = self._channel.gather(headers, self._residuals, counts)
            for piece, block in gathered.blocks:
                everyone[:, piece] = block
        return {RESIDUALS: everyone}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `collect` returned, which rank 0 alone has; every rank calls this."""
        if self._wire.exact:
            return
        row = np.empty(self._size, dtype=np.float32)
        for client, home in enumerate(self._homes):
            if self._channel.rank == 0:
                row[:] = state[RESIDUALS][client]
            with self._channel.timing.mute():
                self._channel.broadcast(row, client)
            if home == self._channel.rank:
                self._residuals[client - self._first] = row
