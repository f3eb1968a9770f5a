"""Error feedback: the sender keeps the rounding errors of a short codec and sends them later.

Each client adds its residual to its update, sends the sum as far as the codec represents it, and keeps the rest as the
new residual. The server does the same with the step of the global vector. So errors do not accumulate over the rounds.

A residual lives on the rank of its client. Rank 0 has a copy of all of them for the checkpoint, and receives those that
have changed since the last one: of 2,000 clients of whom ten take part in a round, ten vectors travel and not 2,000.

Legend: K clients, P parameters.

References:
    Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014; Karimireddy et al., Error Feedback Fixes SignSGD
    and other Gradient Compression Schemes, 2019, arXiv:1901.09847 (Algorithm 2); Tang et al., DoubleSqueeze, 2019,
    arXiv:1905.05957 (both ways).
"""

from collections.abc import Iterable

import numpy as np

from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.codec import Codec
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.rules.aggregator_base import LARGEST_NORM, euclidean_norm
from fedprompt_mpi.rules.spill import zeros

RESIDUALS = "client_residuals"


def send_with_feedback(values: np.ndarray, residual: np.ndarray, codec: Codec) -> None:
    """Replace `values` `[P]` float32 by the sent numbers and `residual` `[P]` float32 by the rest, in place."""
    residual += values
    values[:] = codec.quantise(residual)
    residual -= values


class ClientFeedback:
    """The residuals of this rank's clients, `[k, P]` float32."""

    def __init__(self, codec: Codec, clients: int, size: int, channel: Channel) -> None:
        """Start with residuals of zero.

        Args:
            codec: of the updates.
            clients: K.
            size: P.
            channel: between the ranks.
        """
        self._codec, self._channel, self._size = codec, channel, size
        self._homes = home_ranks(clients, channel.size)
        self._first, own = int((self._homes < channel.rank).sum()), int((self._homes == channel.rank).sum())
        self._residuals = zeros(0 if codec.exact else own, size)
        self._everyone = zeros(0 if codec.exact or channel.rank else clients, size)
        self._trained: set[int] = set()

    def note(self, clients: Iterable[int]) -> None:
        """Note which clients of all ranks take part in a round; every rank calls this."""
        self._trained.update(clients)

    def send(self, client: int, delta: np.ndarray) -> None:
        """Replace a client's delta `[P]` float32 by the sent numbers, in place.

        An update that the server will drop is sent unchanged and leaves the residual unchanged. The server's own update
        (FLTrust) stays on rank 0, is encoded like the others, and has no residual.
        """
        if self._codec.exact or not euclidean_norm(delta) <= LARGEST_NORM:
            return
        if client == len(self._homes):
            delta[:] = self._codec.quantise(delta)
        else:
            send_with_feedback(delta, self._residuals[client - self._first], self._codec)

    def collect(self) -> dict[str, np.ndarray]:
        """Return all clients' residuals `[K, P]` on rank 0, by name, for the checkpoint; every rank calls this."""
        if self._codec.exact:
            return {}
        changed, homes = self._changed()
        own = self._residuals[changed[homes == self._channel.rank] - self._first]
        counts = np.bincount(homes, minlength=self._channel.size)
        for chunk, rows in self._channel.gather(own, counts, phase="residuals"):
            if self._channel.rank == 0:
                self._everyone[changed, chunk] = rows
        self._trained.clear()
        return {RESIDUALS: self._everyone}

    @property
    def bytes_to_collect(self) -> np.ndarray:
        """`[R]` int64: what each rank sends when the residuals are collected next."""
        if self._codec.exact:
            return np.zeros(self._channel.size, dtype=np.int64)
        return 4 * self._size * np.bincount(self._changed()[1], minlength=self._channel.size)

    def _changed(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the clients whose residuals have changed since they were collected, and their ranks."""
        changed = np.array(sorted(self._trained), dtype=np.int64)
        return changed, self._homes[changed]

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the residuals that `collect` returned on rank 0; every rank calls this."""
        if self._codec.exact:
            return
        if self._channel.rank == 0:
            self._everyone[:] = state[RESIDUALS]
        counts = np.bincount(self._homes, minlength=self._channel.size)
        with self._channel.phases.timing.mute():
            for chunk, rows in self._channel.scatter(self._everyone, counts, self._size):
                self._residuals[:, chunk] = rows
