"""Updates -> next global vector: who is let in, the aggregator's rule, noise, and the server's optimiser.

Legend: K clients of the round, P parameters.
"""

import contextlib
import dataclasses
from collections.abc import Iterable

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.channel import Channel, Gathered
from fedprompt_mpi.comm.timing import Timing
from fedprompt_mpi.comm.wire import FLOAT32, WIRES, Wire
from fedprompt_mpi.config import FederationConfig, RunConfig
from fedprompt_mpi.federation.aggregate import AGGREGATORS
from fedprompt_mpi.federation.feedback import send_with_feedback
from fedprompt_mpi.federation.overlap import overlapped
from fedprompt_mpi.federation.privacy import DPFedAvg
from fedprompt_mpi.federation.room import KeptPieces
from fedprompt_mpi.federation.rule import LARGEST_NORM, Aggregator, Updates


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """What the server made of a round's updates."""

    dropped: list[int]
    """Clients whose update or loss was not finite."""
    aggregated: bool
    """Whether there was enough for the rule, on rank 0; if not, the vector stays as it is."""
    shares: np.ndarray | None = None
    """`[K]` factor of each client's delta, on rank 0; None if the rule goes by coordinate or nothing was aggregated."""


class ServerOptimizer:
    """What becomes of the aggregated delta; as it stands, w += server_lr * delta (FedAvg at server_lr 1).

    All of it goes coordinate by coordinate, so a piece of the vector at a time will do.

    References:
        Reddi et al., Adaptive Federated Optimization, 2021, arXiv:2003.00295, Algorithms 1 and 2.
    """

    slots: tuple[str, ...] = ()
    """Vectors that it keeps from round to round."""

    def __init__(self, config: FederationConfig, size: int) -> None:
        """Start with empty slots of P numbers."""
        self.config = config
        self.state = {name: self._empty(name, size) for name in self.slots}

    def _empty(self, name: str, size: int) -> np.ndarray:
        return np.zeros(size, dtype=np.float32)

    def step(self, piece: slice, delta: np.ndarray) -> np.ndarray:
        """Return how far one piece of the global vector goes `[piece]` float64, given its delta `[piece]` float64."""
        return self.config.server_lr * delta


class Momentum(ServerOptimizer):
    """FedAvgM: v = beta_1 v + delta, w += server_lr * v.

    References:
        Hsu et al., Measuring the Effects of Non-Identical Data Distribution, 2019, arXiv:1909.06335, Section 4.3.
    """

    slots = ("momentum",)

    def step(self, piece: slice, delta: np.ndarray) -> np.ndarray:
        """Return server_lr * v; see `ServerOptimizer`."""
        momentum = self.config.server_momentum * self.state["momentum"][piece] + delta
        self.state["momentum"][piece] = momentum
        return self.config.server_lr * momentum


class Adam(ServerOptimizer):
    """FedAdam: m = b1 m + (1 - b1) delta, v = b2 v + (1 - b2) delta^2, w += server_lr * m / (sqrt(v) + tau).

    References:
        Reddi et al., Adaptive Federated Optimization, 2021, arXiv:2003.00295, Algorithm 2 (v starts at tau^2).
    """

    slots = ("momentum", "second_moment")

    def _empty(self, name: str, size: int) -> np.ndarray:
        start = self.config.server_tau**2 if name == "second_moment" else 0.0
        return np.full(size, start, dtype=np.float32)

    def _second_moment(self, before: np.ndarray, square: np.ndarray) -> np.ndarray:
        return self.config.server_beta2 * before + (1 - self.config.server_beta2) * square

    def step(self, piece: slice, delta: np.ndarray) -> np.ndarray:
        """Return server_lr * m / (sqrt(v) + tau); see `ServerOptimizer`."""
        beta = self.config.server_momentum
        momentum = beta * self.state["momentum"][piece] + (1 - beta) * delta
        second = self._second_moment(self.state["second_moment"][piece].astype(np.float64), delta**2)
        self.state["momentum"][piece], self.state["second_moment"][piece] = momentum, second
        return self.config.server_lr * momentum / (np.sqrt(second) + self.config.server_tau)


class Yogi(Adam):
    """FedYogi: as FedAdam, with v = v - (1 - b2) delta^2 sign(v - delta^2).

    References:
        Reddi et al., Adaptive Federated Optimization, 2021, arXiv:2003.00295, Algorithm 2.
    """

    def _second_moment(self, before: np.ndarray, square: np.ndarray) -> np.ndarray:
        return before - (1 - self.config.server_beta2) * square * np.sign(before - square)


SERVER_OPTIMIZERS = {"plain": ServerOptimizer, "momentum": Momentum, "adam": Adam, "yogi": Yogi}


RESIDUAL = "server_residual"


def make_rule(config: RunConfig) -> Aggregator:
    """Return the aggregator that the settings name."""
    if config.privacy.mechanism == "dp_fedavg":
        return DPFedAvg(config.federation, config.privacy)
    return AGGREGATORS[config.federation.aggregator](config.federation)


class Server:
    """The global vector, and the rule that moves it. Every rank has one; only rank 0's has a memory.

    With a short wire format the first broadcast brings the whole vector, the others only the step that it took, of
    which the server keeps what the format cannot carry. So all ranks always have the same vector.
    """

    def __init__(self, vector: np.ndarray, config: RunConfig, *, is_root: bool) -> None:
        """Start from `vector` `[P]` float32, which is changed in place."""
        self.vector = vector
        self._config, self._is_root = config, is_root
        self._rule = make_rule(config)
        optimizer = SERVER_OPTIMIZERS[config.federation.server_optimizer]
        self._optimizer = optimizer(config.federation, len(vector) if is_root else 0)
        self._wire = WIRES[config.comm.wire]
        self._everyone_has_a_vector = False
        # of a short format: the last step, and what is left of all steps
        self._step = np.zeros(0 if self._wire.exact else len(vector), dtype=np.float32)
        self._residual = np.zeros_like(self._step)

    def state(self) -> dict[str, np.ndarray]:
        """Return what is remembered from round to round beside the vector, for the checkpoint."""
        residual = {} if self._wire.exact else {RESIDUAL: self._residual}
        return {**self._optimizer.state, **self._rule.state(), **residual}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take back what `state` returned; nothing if the run begins."""
        if state:
            self._optimizer.state = {name: state[name] for name in self._optimizer.slots}
            self._rule.restore(state)
            if not self._wire.exact:
                self._residual[:] = state[RESIDUAL]

    def broadcast(self, channel: Channel, fingerprint: int) -> Wire:
        """Bring everybody's vector up to date; returns the format in which it went."""
        if self._wire.exact or not self._everyone_has_a_vector:
            channel.broadcast(self.vector, fingerprint)
            self._everyone_has_a_vector = True
            return FLOAT32
        channel.broadcast(self._step, fingerprint, self._wire)
        if not self._is_root:
            self.vector += self._step
        return self._wire

    def apply(self, gathered: Gathered, timing: Timing, round_: int) -> Aggregation:
        """Take in a round's updates, piece by piece.

        Every rank calls this, since the pieces travel while they are asked for; that time is the gather's. What is
        not finite never comes near the rule. A dropped client may have been honest, so f stays what it is as far as
        those that are left allow. If they are too few for any f, or the server's own update (FLTrust) is lost, the
        vector stays as it is.
        """
        headers, settings = gathered.headers, self._config.federation
        finite, is_client = is_finite(headers), headers["client"] < settings.clients
        dropped = headers["client"][~finite & is_client].tolist()
        kept, count = np.flatnonzero(finite), int((finite & is_client).sum())
        allowed = self._rule.most_malicious(count)
        self._step[:] = 0
        if allowed is None or not finite[~is_client].all():
            return Aggregation(dropped=dropped, aggregated=False)
        summed = self._config.comm.collective == "reduce"
        if not self._is_root and not summed:
            for _ in gathered.blocks:
                pass
            return Aggregation(dropped=dropped, aggregated=False)
        updates = Updates(
            clients=headers["client"][kept].astype(np.int64),
            num_examples=headers["num_examples"][kept].astype(np.float64),
            norms=headers["norm"][kept],
            parameters=len(self.vector),
            assumed_malicious=min(settings.assumed_malicious, allowed),
        )
        everyone = np.zeros(len(headers))
        if summed:  # by a rule that needs the headers only, which every rank has
            self._rule.begin(updates)
            everyone[kept] = self._rule.weigh(updates)
            self._move(gathered.sums(everyone), timing, round_)
        else:
            everyone[kept] = self._combine(gathered, updates, kept, timing, round_)
        shares = None if self._rule.coordinate_wise else everyone
        return Aggregation(dropped=dropped, aggregated=True, shares=shares)

    def _combine(
        self, gathered: Gathered, updates: Updates, kept: np.ndarray, timing: Timing, round_: int
    ) -> np.ndarray:
        """Move by what the rule makes of all clients' deltas; returns the factor of each that was kept."""
        complete = len(kept) == len(gathered.headers)
        blocks = ((piece, deltas if complete else deltas[kept]) for piece, deltas in gathered.blocks)
        with contextlib.closing(KeptPieces(len(kept), len(self.vector))) as pieces:
            self._rule.begin(updates)
            if self._rule.looks_first:

                def look(piece: slice, deltas: np.ndarray) -> None:
                    with timing.phase("aggregate"):
                        self._rule.look(piece, deltas, self.vector[piece])
                        pieces.keep(piece, deltas)

                overlapped(blocks, look)
                blocks = pieces
            with timing.phase("aggregate"):
                shares = self._rule.weigh(updates)
            self._move(blocks, timing, round_, shares)
        return shares

    def _move(
        self, blocks: Iterable[tuple[slice, np.ndarray]], timing: Timing, round_: int, shares: np.ndarray | None = None
    ) -> None:
        """Combine piece after piece, add the noise, and go as far as the optimiser says.

        Args:
            blocks: pieces with all deltas `[K, piece]`, or, without shares, with their sum `[piece]`.
            timing: where the time goes.
            round_: of the noise.
            shares: `[K]` float64.
        """
        noise_std = np.hypot(self._rule.noise_std, self._config.federation.noise_std)
        rng = seeds.generator(self._config.seed, "server noise", round_)
        target = self.vector if self._wire.exact else self._step

        def move(piece: slice, block: np.ndarray) -> None:
            if not self._is_root:
                return
            with timing.phase("aggregate"):
                delta = block if shares is None else self._rule.combine(block, shares)
                if noise_std:
                    delta += noise_std * rng.standard_normal(len(delta))
                target[piece] += self._optimizer.step(piece, delta)

        overlapped(blocks, move)
        if self._is_root and not self._wire.exact:
            with timing.phase("pack"):
                send_with_feedback(self._step, self._residual, self._wire)
                self.vector += self._step


def is_finite(headers: np.ndarray) -> np.ndarray:
    """Tell which updates of a round are finite `[K]` bool, from their norms and losses.

    One of a norm beyond `LARGEST_NORM` is not: its square, or a sum of such, would not be.
    """
    return np.isfinite(headers["loss"]) & (headers["norm"] <= LARGEST_NORM)
