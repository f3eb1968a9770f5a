"""A round, phase by phase, for clients, nodes and a network that were not measured.

Legend: K clients of a round, W workers, P numbers in a vector, n bytes of it as it travels.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from fedprompt_mpi.forecast.costs import HEADER_BYTES, Placement, Vector, meetings, receive_buffers
from fedprompt_mpi.forecast.estimate import Estimate, total
from fedprompt_mpi.forecast.links import Links, cost_of, fit_links
from fedprompt_mpi.forecast.network import Network
from fedprompt_mpi.forecast.sources import Measured, Rounds, crowding
from fedprompt_mpi.forecast.speeds import EQUAL, Speeds, kept_mean, slowest
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.pairwise import PairwiseRule
from fedprompt_mpi.rules.spill import MOST_KEPT_BYTES
from fedprompt_mpi.text.batches import TOKENS_PER_EVALUATION_BATCH

DRIFT = 0.15
"""Relative error of the seconds of any work that was measured in another job: machines are as fast as their neighbours
let them be."""
NOT_MEASURED = 0.5
"""Relative error of aggregation under another collective than the measured one."""
ANOTHER_SHARE = 0.1
"""Relative error if a worker has more than twice, or less than half, the clients that were measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is asked about."""

    place: Placement
    collective: str
    wire: str
    speeds: Speeds = EQUAL
    left_out: float = 0.0
    """Share of the clients, the slowest, that a round does not wait for."""

    @property
    def arriving(self) -> Placement:
        """The ranks with the clients whose updates are waited for."""
        kept = max(1, math.ceil(self.place.clients * (1 - self.left_out)))
        return dataclasses.replace(self.place, clients=kept)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a round of a scenario takes."""

    scenario: Scenario
    method: str
    vector: Vector
    phases: dict[str, Estimate]
    """Phase -> seconds of a round, in the mean over rounds."""
    waiting: float
    """Seconds that the mean worker waits for the slowest one."""
    bytes_up: float
    """Of vectors and headers, that rank 0's node receives in a round."""
    bytes_down: float
    """That it sends."""
    bytes_total: float
    """On all links between nodes."""
    memory: float
    """Of rank 0, in bytes."""

    @property
    def round(self) -> Estimate:
        """Seconds of a round."""
        return total(self.phases)

    @property
    def moving(self) -> Estimate:
        """Seconds in which updates are packed, travel and are aggregated: what differs between collectives."""
        return total({name: self.phases[name] for name in ("wait", "pack", self.scenario.collective, "aggregate")})

    @property
    def on_the_link(self) -> float:
        """Share of the round in which vectors travel between nodes."""
        if self.scenario.place.nodes == 1:
            return 0.0
        moved = self.phases["broadcast"].seconds + self.phases[self.scenario.collective].seconds
        return moved / self.round.seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What all sources together show."""

    links: Links
    """Constants of the network that is asked about."""
    here: Links
    """Of the one on which was measured."""
    cold: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Collective -> seconds that it takes longer in a round than by itself."""
    crowding: float = 0.0
    """Share by which a core takes longer for a client for each further worker that it has."""


class Model:
    """Rounds of one measured run on a network."""

    def __init__(self, run: Rounds, fitted: Fitted) -> None:
        """Take a run's rounds, and what all sources together show."""
        self.run, self._fitted, self._links = run, fitted, fitted.links
        self._cores, self._cores_then = (on.network.contention.cores for on in (fitted.links, fitted.here))
        rule = registry.aggregators.get(run.config.federation.aggregator)
        self._pairs = run.config.federation.mixing or (rule is not None and issubclass(rule, PairwiseRule))
        self._sees_first = rule is not None and rule.observes_first

    def forecast(self, scenario: Scenario) -> Forecast:
        """Return what a round takes."""
        place, links, arriving = scenario.place, self._links, scenario.arriving
        vector, collective = self.run.as_wire(scenario.wire), scenario.collective
        up = self._transfer(collective, arriving, vector)
        train, waiting = self._train(scenario)
        aggregate = left_after_overlap(self._aggregate(scenario), up, meetings(arriving, vector, collective) + 1)
        phases = {
            "broadcast": self._transfer("broadcast", place, vector),
            "evaluate": self._evaluate(place),
            "train": train,
            "wait": self._wait(scenario, vector),
            "pack": self._pack(scenario),
            collective: up,
            "aggregate": aggregate,
            "checkpoint": self._checkpoint(scenario, vector),
        }
        named = ((collective, arriving), ("broadcast", place), (f"headers of {collective}", arriving))
        costs = [cost_of(name, where, vector, links.library) for name, where in named]
        return Forecast(
            scenario=scenario, method=self.run.method, vector=vector, phases=phases, waiting=waiting,
            bytes_up=sum(c.server_down for c in costs), bytes_down=sum(c.server_up for c in costs),
            bytes_total=sum(c.total for c in costs), memory=self._memory(scenario, vector),
        )  # fmt: skip

    def _transfer(self, collective: str, place: Placement, vector: Vector) -> Estimate:
        """Return the seconds of a collective in a round."""
        if place.ranks == 1:
            return Estimate()
        known = self._fitted.cold
        cold = known.get(collective, max(known.values(), default=0.0))
        return self._links.seconds(collective, place, vector) + Estimate(cold, {"cold": cold})

    def client(self) -> Estimate:
        """Return the seconds of a client's training on a core, or GPU, of its own."""
        run, crowd = self.run, self.run.crowd
        if self._cores_then is not None:
            crowd = max(crowd, run.place.busy / self._cores_then)
        slower = crowd * (1 + self._fitted.crowding * (crowd - 1))
        return _work([seconds / run.place.clients / slower for seconds in run.work], "train")

    def _train(self, scenario: Scenario) -> tuple[Estimate, float]:
        """Return the seconds until the slowest worker has trained its clients, and how long the mean worker waits.

        Workers differ a little even with equal clients. Where all ranks share some cores, these have all clients to do.
        """
        place, run, speeds = scenario.place, self.run, scenario.speeds
        longest = slowest(speeds, place.clients, place.workers, scenario.left_out, run.unevenness)
        mean = place.clients * kept_mean(speeds, scenario.left_out) / place.busy
        client = self.client()
        if self._cores is not None and place.busy > self._cores:
            crowd = place.busy / self._cores
            longest = max(longest, mean * crowd)
            client *= 1 + self._fitted.crowding * (crowd - 1)
        found, ratio = client * longest, place.most_on_a_worker / run.place.most_on_a_worker
        found = found if 0.5 <= ratio <= 2 else found.less_certain("share", ANOTHER_SHARE)
        return found, client.seconds * max(0.0, longest - mean)

    def _evaluate(self, place: Placement) -> Estimate:
        """Return the seconds of evaluation, shared by all ranks in whole batches, in the mean over rounds."""
        run, tokens = self.run, self.run.config.model.max_length
        if not run.evaluation:
            return Estimate()
        batches = max(1, run.evaluated * tokens // TOKENS_PER_EVALUATION_BATCH)
        then, now = (
            math.ceil(batches / min(batches, self._scoring(where), cores or where.ranks))
            for where, cores in ((run.place, self._cores_then), (place, self._cores))
        )
        evaluated = [seconds for seconds in run.evaluate if seconds > 0]
        return _work(evaluated, "evaluate") * (now / then / run.config.output.evaluate_every)

    def _scoring(self, place: Placement) -> int:
        """Return how many ranks evaluate: all, or those with a GPU, which rank 0 has none of."""
        return place.ranks if self.run.device.startswith("cpu") else place.workers

    def _wait(self, scenario: Scenario, vector: Vector) -> Estimate:
        """Return what rank 0 waits beyond training: a round's small messages, and what was measured beside them.

        That is mostly the meetings between chunks, hence more of them take longer.
        """
        run, place, collective = self.run, scenario.arriving, scenario.collective
        if place.ranks == 1:
            return Estimate()
        beside, now = 0.0, meetings(place, vector, collective)
        if run.place.ranks > 1:
            then = meetings(run.place, run.vector, run.collective)
            small = self._fitted.here.seconds(f"headers of {run.collective}", run.place, run.vector).seconds
            beside = max(0.0, statistics.median(run.wait) - small) * max(1.0, (1 + now) / (1 + then))
        small = self._links.seconds(f"headers of {collective}", place, vector)
        meeting = self._links.seconds("headers of gather", dataclasses.replace(place, clients=place.busy), vector)
        small += meeting * (now / 3)
        return small + Estimate(beside, {"wait": max(beside, _deviation(run.wait))})

    def _aggregate(self, scenario: Scenario) -> Estimate:
        """Return the seconds of aggregation at rank 0.

        A rule that compares all pairs of updates takes K^2 P, any other K P. In a sum along the tree rank 0 has one
        vector, which takes as long for any K.
        """
        run, ratio = self.run, scenario.arriving.clients / self.run.place.clients
        found = _work(run.aggregate, "aggregate")
        if scenario.collective != run.collective:
            found = found.less_certain("collective", NOT_MEASURED)
        if scenario.collective == "reduce":
            return found
        if run.collective == "reduce":
            return found * scenario.arriving.clients
        return found * ratio ** (2 if self._pairs else 1)

    def _pack(self, scenario: Scenario) -> Estimate:
        """Return the seconds of packing, at the fullest worker.

        Workers add up their clients' updates before a reduction. Short formats are unpacked at rank 0, all K of them.
        """
        run, place = self.run, scenario.arriving
        share = place.most_on_a_worker / run.place.most_on_a_worker
        if self._cores is not None and place.busy > self._cores:
            share = max(share, place.clients / self._cores / run.place.most_on_a_worker)
        if scenario.wire != "float32":
            share = max(share, place.clients / run.place.clients)
        found = _work(run.pack, "pack") * share
        if scenario.wire != run.wire or scenario.collective != run.collective:
            found = found.less_certain("packing", 1.0)
        if scenario.collective == "reduce" != run.collective:
            found += _work(run.aggregate, "aggregate") * (place.most_on_a_worker / run.place.clients)
        return found

    def _checkpoint(self, scenario: Scenario, vector: Vector) -> Estimate:
        """Return the seconds of a checkpoint, in the mean over rounds; short formats bring all residuals along."""
        found = _work([self.run.checkpoint], "checkpoint")
        if scenario.wire != "float32":
            numbers = vector.numbers
            found += self._transfer("gather", scenario.arriving, Vector(numbers, 4 * numbers))
        return found * (1 / self.run.config.output.checkpoint_every)

    def _memory(self, scenario: Scenario, vector: Vector) -> float:
        """Return the most bytes of rank 0: as measured, with what depends on the clients as it would be."""
        run = self.run

        def by_clients(place: Placement, vector: Vector, collective: str) -> float:
            kept = receive_buffers(place, vector, collective) + HEADER_BYTES * place.clients
            updates = 4 * vector.numbers * place.clients
            if place.ranks == 1 or vector.bytes != 4 * vector.numbers:
                kept += updates  # the clients' own, or their residuals
            if self._sees_first and updates <= MOST_KEPT_BYTES:
                kept += updates
            return kept + (8 * place.clients**2 if self._pairs else 0)

        then = by_clients(run.place, run.vector, run.collective)
        return max(0.0, run.memory - then) + by_clients(scenario.arriving, vector, scenario.collective)


def fit(measured: Measured, measured_on: Network | None, network: Network | None) -> Fitted:
    """Return what sources show that were measured on a network, for another or for the same; None as they show it."""
    here = fit_links(measured.transfers, measured_on, measured_on)
    links = fit_links(measured.transfers, measured_on, network)
    return Fitted(links=links, here=here, cold=cold_starts(measured.runs, here), crowding=crowding(measured.runs))


def cold_starts(runs: Sequence[Rounds], links: Links) -> dict[str, float]:
    """Return collective -> seconds by which it takes longer in a round, right after training, than by itself.

    They are those of the smallest vector that was measured in a round: caches are cold, processes have to wake up.
    """
    found: dict[str, float] = {}
    for run in sorted((run for run in runs if run.place.ranks > 1), key=lambda run: run.vector.bytes):
        for name, seconds in run.transfers.items():
            if min(seconds) > 0 and name not in found:
                alone = links.seconds(name, run.place, run.vector).seconds
                found[name] = max(0.0, statistics.median(seconds) - alone)
    return found


def left_after_overlap(work: Estimate, transfer: Estimate, count: int) -> Estimate:
    """Return what aggregation adds to a transfer: a chunk is aggregated while the next arrives, the last one after."""
    piece, arriving = work.seconds / count, transfer.seconds / count
    left = piece + (count - 1) * max(0.0, piece - arriving)
    return work * (left / work.seconds) if work.seconds else work


def _work(samples: Sequence[float], name: str) -> Estimate:
    """Return the median of measured seconds, with what rounds differ by and what jobs do."""
    middle = statistics.median(samples)
    return Estimate(middle, {name: max(_deviation(samples), DRIFT * middle)})


def _deviation(samples: Sequence[float]) -> float:
    """Return a standard deviation from the middle half, which single slow rounds do not change."""
    middle = statistics.median(samples)
    return 1.4826 * statistics.median(abs(one - middle) for one in samples)
