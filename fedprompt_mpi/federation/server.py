"""The server: from updates to the next global vector, by the aggregation rule, noise and the server's optimiser.

Legend: K clients of the round, P parameters.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.codec import FLOAT32, Codec, make_codec
from fedprompt_mpi.comm.timing import Phases
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.feedback import send_with_feedback
from fedprompt_mpi.federation.overlap import overlapped
from fedprompt_mpi.federation.privacy import DPFedAvg
from fedprompt_mpi.federation.updates import Gathered, Verdict, is_finite
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.aggregator_base import Aggregator, Updates
from fedprompt_mpi.rules.low_rank import Pair, ProductSums
from fedprompt_mpi.rules.mixing import Mixed
from fedprompt_mpi.rules.spill import SpilledChunks


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """The result of aggregating a round's updates."""

    dropped: list[int]
    """Clients whose update or loss was not finite."""
    aggregated: bool
    """False if too few updates were left for the rule; then the vector is unchanged. The same on every rank."""
    weights: np.ndarray | None = None
    """`[K]` weight of each update, on rank 0; None under a rule by coordinate, and if nothing was aggregated."""
    lora_error: float | None = None
    """How far LoRA's products are from their exact weighted sums, relative to the step; on rank 0."""


RESIDUAL = "server_residual"


def make_rule(config: RunConfig) -> Aggregator:
    """Return the aggregation rule that the settings name."""
    if config.privacy.mechanism == "dp_fedavg":
        return DPFedAvg(config.federation, config.privacy)
    rule = registry.aggregators[config.federation.aggregator](config.federation)
    return Mixed(rule) if config.federation.mixing else rule


class Server:
    """The global vector and the rule that updates it. Every rank has one; only rank 0's has state.

    With a short codec the first broadcast sends the whole vector, later ones only the last step, whose rounding errors
    the server keeps. So all ranks always have the same vector.
    """

    def __init__(self, vector: np.ndarray, config: RunConfig, *, is_root: bool, pairs: Sequence[Pair] = ()) -> None:
        """Start from `vector` `[P]` float32, which changes in place; `pairs` are LoRA's factors in it."""
        self.vector, self._pairs = vector, pairs
        self._multiplies = bool(pairs) and config.prompt.lora.aggregation == "product"
        self._config, self._is_root = config, is_root
        self._rule = make_rule(config)
        optimizer = registry.server_optimizers[config.federation.server_optimizer]
        self._optimizer = optimizer(config.federation, len(vector) if is_root else 0)
        self._codec = make_codec(config.comm)
        self._everyone_has_a_vector = False
        # of a short codec: the last step, and the rounding errors of all steps
        self._step = np.zeros(0 if self._codec.exact else len(vector), dtype=np.float32)
        self._residual = np.zeros_like(self._step)

    def state(self) -> dict[str, np.ndarray]:
        """Return the state beside the vector, for the checkpoint."""
        residual = {} if self._codec.exact else {RESIDUAL: self._residual}
        return {**self._optimizer.state, **self._rule.state(), **residual}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from the state that `state` returned; do nothing if it is empty, at the begin of a run."""
        if state:
            self._optimizer.state = {name: state[name] for name in self._optimizer.slots}
            self._rule.restore(state)
            if not self._codec.exact:
                self._residual[:] = state[RESIDUAL]

    def broadcast(self, channel: Channel) -> Codec:
        """Bring the vector of every rank up to date; return the codec with which it was sent."""
        if self._codec.exact or not self._everyone_has_a_vector:
            channel.broadcast(self.vector)
            self._everyone_has_a_vector = True
            return FLOAT32
        channel.broadcast(self._step, self._codec)
        if not self._is_root:
            self.vector += self._step
        return self._codec

    def judge(self, headers: np.ndarray) -> Verdict:
        """Return what all ranks have to know of a round's updates, from their headers `[K]`; on rank 0."""
        finite, is_client = is_finite(headers), headers["client"] < self._config.federation.clients
        honest = ~np.isin(headers["client"], list(attacking_clients(self._config)))
        return Verdict(
            given_up=bool(headers["given_up"].any()),
            asked_to_stop=bool(headers["asked_to_stop"].any()),
            diverged=bool(honest.any() and not finite[honest].any()),
            aggregated=self._most_malicious(headers) is not None and bool(finite[~is_client].all()),
        )

    def malicious_share(self, headers: np.ndarray) -> float | None:
        """Return what malicious clients' updates count for before the rule, as a share of all; None if there are none.

        Args:
            headers: `[K]` of dtype `HEADER`, of the clients of a round.
        """
        weighs = self._rule.weighs_examples and self._config.federation.weighting == "examples"
        counts = headers["num_examples"] if weighs else np.ones(len(headers))
        total = float(counts.sum())
        return float(counts[np.isin(headers["client"], self._config.malicious)].sum()) / total if total else None

    def _most_malicious(self, headers: np.ndarray) -> int | None:
        """Return the largest f that the finite updates of clients allow the rule to assume; None if none."""
        is_client = headers["client"] < self._config.federation.clients
        return self._rule.most_malicious(int((is_finite(headers) & is_client).sum()))

    def apply(self, gathered: Gathered, phases: Phases, round_: int) -> Aggregation:
        """Aggregate a round's updates, chunk by chunk, and move the vector.

        Every rank calls this, since the chunks travel while they are asked for. Updates that are not finite are dropped
        before the rule sees them. A dropped client may have been honest, so f stays the same as far as the remaining
        clients allow. If they are too few for any f, or the server's own update (FLTrust) is dropped, the vector is
        unchanged.
        """
        headers, settings = gathered.headers, self._config.federation
        finite, is_client = is_finite(headers), headers["client"] < settings.clients
        dropped = headers["client"][~finite & is_client].tolist()
        self._step[:] = 0
        if not gathered.verdict.aggregated:
            return Aggregation(dropped=dropped, aggregated=False)
        summed = self._config.comm.collective == "reduce"
        if not self._is_root:
            collections.deque(gathered.sums(None) if summed else gathered.chunks, maxlen=0)
            return Aggregation(dropped=dropped, aggregated=True)
        kept, equal = np.flatnonzero(finite), settings.weighting == "equal"
        allowed = self._most_malicious(headers)
        assert allowed is not None
        updates = Updates(
            clients=headers["client"][kept].astype(np.int64),
            num_examples=np.ones(len(kept)) if equal else headers["num_examples"][kept].astype(np.float64),
            norms=headers["norm"][kept],
            parameters=len(self.vector),
            assumed_malicious=min(settings.assumed_malicious, allowed),
            num_clients=settings.clients,
            seed=int(seeds.generator(self._config.seed, "aggregator", round_).integers(2**63)),
        )
        everyone = np.zeros(len(headers))
        if summed:  # by a rule that needs the headers only
            self._rule.begin(updates)
            everyone[kept] = self._rule.weights(updates)
            self._move(gathered.sums(everyone), phases, round_)
            error = None
        else:
            complete = len(kept) == len(headers)
            chunks = ((chunk, deltas if complete else deltas[kept]) for chunk, deltas in gathered.chunks)
            everyone[kept], error = self._combine(chunks, updates, phases, round_)
        shares = None if self._rule.coordinate_wise else everyone
        return Aggregation(dropped=dropped, aggregated=True, weights=shares, lora_error=error)

    def _combine(
        self, chunks: Iterable[tuple[slice, np.ndarray]], updates: Updates, phases: Phases, round_: int
    ) -> tuple[np.ndarray, float | None]:
        """Move the vector by the rule's combination of the deltas `[K, chunk]`; return weights `[K]`, LoRA's error."""
        with contextlib.closing(SpilledChunks(len(updates.clients), len(self.vector))) as spilled:
            self._rule.begin(updates)
            if self._rule.observes_first:

                def observe(chunk: slice, deltas: np.ndarray) -> None:
                    with phases.timing.time("aggregate"):  # in a second thread
                        self._rule.observe(chunk, deltas, self.vector[chunk])
                        spilled.keep(chunk, deltas)

                overlapped(chunks, len(self.vector), observe, lambda: phases.liveness.enter("aggregate", round_))
                with phases.time("aggregate"):
                    while self._rule.observed():
                        for chunk, deltas in spilled:
                            self._rule.observe(chunk, deltas, self.vector[chunk])
                            phases.liveness.alive()
                chunks = spilled
            with phases.time("aggregate"):
                weights = self._rule.weights(updates)
            return weights, self._move(chunks, phases, round_, weights)

    def _move(
        self, chunks: Iterable[tuple[slice, np.ndarray]], phases: Phases, round_: int, weights: np.ndarray | None = None
    ) -> float | None:
        """Combine chunk after chunk, add the noise, and apply the optimiser's step; return LoRA's error.

        Args:
            chunks: all deltas `[K, chunk]`, or, without weights, their sum `[chunk]`.
            phases: of this rank.
            round_: of the noise.
            weights: `[K]` float64.
        """
        noise_std = np.hypot(self._rule.noise_std, self._config.federation.noise_std)
        rng = seeds.generator(self._config.seed, "server noise", round_)
        target = self.vector if self._codec.exact else self._step
        sums = None
        wanted = self._multiplies or self._config.output.lora_error
        if self._pairs and wanted and weights is not None and self._rule.is_weighted_sum():
            sums = ProductSums(self._pairs, self.vector, weights)

        def combined(chunk: slice, numbers: np.ndarray) -> Iterable[tuple[slice, np.ndarray]]:
            if sums is not None and self._multiplies:
                return sums.steps(chunk, numbers)
            if sums is not None:
                sums.measure(chunk, numbers)
            return [(chunk, numbers if weights is None else self._rule.combine(chunk, numbers, weights))]

        def move(chunk: slice, numbers: np.ndarray) -> None:
            with phases.timing.time("aggregate"):  # in a second thread
                for place, delta in combined(chunk, numbers):
                    if noise_std:
                        delta += noise_std * rng.standard_normal(len(delta))
                    target[place] += self._optimizer.step(place, delta)
                phases.liveness.alive()

        overlapped(chunks, len(self.vector), move, lambda: phases.liveness.enter("aggregate", round_))
        if not self._codec.exact:
            with phases.time("pack"):
                send_with_feedback(self._step, self._residual, self._codec)
                self.vector += self._step
        return None if sums is None else sums.error
