"""The server: from updates to the next global vector, by the aggregation rule, noise and the server's optimiser.

Legend: K clients of the round, P parameters.
"""

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.codec import FLOAT32, Codec, make_codec
from fedprompt_mpi.comm.exact_sum import in_units, rounding_of, unit_of
from fedprompt_mpi.comm.timing import Phases
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.feedback import send_with_feedback
from fedprompt_mpi.federation.overlap import overlapped
from fedprompt_mpi.federation.privacy import DPFedAvg
from fedprompt_mpi.federation.updates import PUBLIC_HEADER, Gathered, RoundGivenUp, Verdict, WholeSum, is_finite
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
    given_up: str | None = None
    """Why a round of secure aggregation has no sum; then the vector is unchanged."""
    rounding: float | None = None
    """Expected rounding error of a bounded sum, relative to it; on rank 0."""


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
        self.last_sum: np.ndarray | None = None
        """Room for the last sum `[P]` float32 before noise and optimiser, on rank 0, if an audit asks for it."""
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
            rounded_away=self._rounds_away(headers[finite]),
        )

    def _rounds_away(self, headers: np.ndarray) -> bool:
        """Return whether a sum in units of the bound would be rounding errors alone, as far as headers tell."""
        if not self._adds_bounded or headers.dtype == PUBLIC_HEADER or not headers["norm"].any():
            return False
        weights = self._unscaled_weights(headers, 0)
        unit = unit_of(weights, np.full(len(headers), self._rule.bound))
        return float(weights @ headers["norm"]) < math.sqrt(len(headers)) * rounding_of(unit, len(self.vector))

    @property
    def _adds_bounded(self) -> bool:
        """Whether updates are added up in units that follow from the rule's bound."""
        return self._rule.bound is not None and self._rule.needs_headers_only()

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
        headers, summed = gathered.headers, self._config.comm.collective == "reduce" or self._is_secure
        self._step[:] = 0
        finite = is_finite(headers)
        dropped = headers["client"][~finite & (headers["client"] < self._config.federation.clients)].tolist()
        if not gathered.verdict.aggregated:
            return Aggregation(dropped=dropped, aggregated=False)
        try:
            if not self._is_root:
                collections.deque(gathered.sums(None) if summed else gathered.chunks, maxlen=0)
                return Aggregation(dropped=dropped, aggregated=True)
            if self._adds_bounded:
                aggregation = self._add_bounded(gathered, phases, round_, summed=summed)
            else:
                aggregation = (self._add if summed else self._apply_rule)(gathered, phases, round_)
        except RoundGivenUp as reason:
            return Aggregation(dropped=dropped, aggregated=False, given_up=str(reason))
        return dataclasses.replace(aggregation, dropped=dropped)

    @property
    def _is_secure(self) -> bool:
        return self._config.privacy.secure_aggregation

    def _updates(self, headers: np.ndarray, round_: int) -> Updates:
        """Return what a rule learns of updates with these headers `[K]`."""
        settings = self._config.federation
        allowed = self._most_malicious(headers)
        assert allowed is not None
        equal, public = settings.weighting == "equal", headers.dtype == PUBLIC_HEADER
        return Updates(
            clients=headers["client"].astype(np.int64),
            num_examples=np.ones(len(headers)) if equal else headers["num_examples"].astype(np.float64),
            norms=np.zeros(len(headers)) if public else headers["norm"],
            parameters=len(self.vector),
            assumed_malicious=min(settings.assumed_malicious, allowed),
            num_clients=settings.clients,
            seed=int(seeds.generator(self._config.seed, "aggregator", round_).integers(2**63)),
        )

    def _apply_rule(self, gathered: Gathered, phases: Phases, round_: int) -> Aggregation:
        """Apply a rule to the deltas as they come."""
        kept = is_finite(gathered.headers) & gathered.came
        rows = np.flatnonzero(kept[gathered.came])  # of those that travel
        everyone, complete = np.zeros(len(kept)), kept.sum() == gathered.came.sum()
        chunks = ((chunk, deltas if complete else deltas[rows]) for chunk, deltas in gathered.chunks)
        everyone[kept], error = self._combine(chunks, self._updates(gathered.headers[kept], round_), phases, round_)
        shares = None if self._rule.coordinate_wise else everyone
        return Aggregation(dropped=[], aggregated=True, weights=shares, lora_error=error)

    def _add(self, gathered: Gathered, phases: Phases, round_: int) -> Aggregation:
        """Add up deltas that MPI sums, by a rule that bounds none."""
        headers, kept = gathered.headers, is_finite(gathered.headers) & gathered.came
        updates, everyone = self._updates(headers[kept], round_), np.zeros(len(headers))
        self._rule.begin(updates)
        everyone[kept] = self._rule.weights(updates)
        unit = unit_of(everyone, headers["largest"])
        totals = gathered.sums(WholeSum(unit, everyone[gathered.came]))
        self._move(totals, phases, round_, combine=lambda chunk, total: unit * total)
        return Aggregation(dropped=[], aggregated=True, weights=everyone)

    def _add_bounded(self, gathered: Gathered, phases: Phases, round_: int, *, summed: bool) -> Aggregation:
        """Add up deltas in units that follow from the rule's bound.

        A client's weight is that among all clients of the round, since it may have to be told before it is known whose
        update comes; in the end the sum is divided by the weight of those whose update came. So all ways to add up give
        the same bits, whether rank 0 sees the updates or not.
        """
        headers, bound = gathered.headers, self._rule.bound
        assert bound is not None
        unscaled = self._unscaled_weights(headers, round_)
        unit = unit_of(unscaled, np.full(len(headers), bound))
        if self._is_secure:
            totals, factors, kept = gathered.sums(WholeSum(unit, unscaled)), unscaled, gathered.came
        else:
            kept = is_finite(headers) & gathered.came
            rounding = rounding_of(unit, len(self.vector))
            factors = np.where(kept, self._rule.bounded_factors(unscaled, headers["norm"], rounding), 0.0)
            totals = gathered.sums(WholeSum(unit, factors[gathered.came])) if summed else gathered.chunks
        scale = 1.0
        if kept.any():
            scale = float(self._unscaled_weights(headers[kept], round_)[0] / unscaled[kept][0])
        weights, squares = np.where(kept, factors * scale, 0.0), [0.0]

        def step(chunk: slice, numbers: np.ndarray) -> np.ndarray:
            total = numbers if summed else in_units(numbers, factors[gathered.came], unit)
            squares.append(float(np.einsum("i,i", total, total, dtype=np.float64)))
            return unit * scale * total

        error = self._move(totals, phases, round_, None if summed else weights[gathered.came], step)
        error_of_sum = math.sqrt(kept.sum() * len(self.vector) / 12)
        share = error_of_sum / math.sqrt(math.fsum(squares)) if any(squares) else None
        return Aggregation(dropped=[], aggregated=True, weights=weights, lora_error=error, rounding=share)

    def _unscaled_weights(self, headers: np.ndarray, round_: int) -> np.ndarray:
        """Return the weights of a bounded rule `[K]`, before updates are scaled to the bound."""
        updates = self._updates(headers, round_)
        self._rule.begin(updates)
        return self._rule.weights(dataclasses.replace(updates, norms=np.zeros(len(headers))))

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
        self,
        chunks: Iterable[tuple[slice, np.ndarray]],
        phases: Phases,
        round_: int,
        weights: np.ndarray | None = None,
        combine: Callable[[slice, np.ndarray], np.ndarray] | None = None,
    ) -> float | None:
        """Combine chunk after chunk, add the noise, and apply the optimiser's step; return LoRA's error.

        Args:
            chunks: all deltas `[K, chunk]`, or their sum in units `[chunk]`.
            phases: of this rank.
            round_: of the noise.
            weights: `[K]` float64 of the deltas.
            combine: makes the step `[chunk]` float64 of a chunk; by default the rule does, with the weights.
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
            if combine is not None:
                return [(chunk, combine(chunk, numbers))]
            assert weights is not None
            return [(chunk, self._rule.combine(chunk, numbers, weights))]

        def move(chunk: slice, numbers: np.ndarray) -> None:
            with phases.timing.time("aggregate"):  # in a second thread
                for place, delta in combined(chunk, numbers):
                    if self.last_sum is not None:
                        self.last_sum[place] = delta
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
