"""The answer: forecasts of several scenarios side by side, where one overtakes another, and what is not known."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.forecast.costs import FEW_NODES, Placement, evenly, is_mpich
from fedprompt_mpi.forecast.links import uses_ring
from fedprompt_mpi.forecast.model import Fitted, Forecast, Model, Scenario, fit
from fedprompt_mpi.forecast.network import Network
from fedprompt_mpi.forecast.sources import MEASURE, Measured
from fedprompt_mpi.forecast.speeds import EQUAL, Speeds

GRID = [round(10 ** (exponent / 10)) for exponent in range(10, 61)]
"""Numbers of clients of the figure: 10 to 10^6."""
LEFT_OUT = (0.0, 0.05, 0.10, 0.20)
"""Shares of the clients that a round does not wait for."""
HALF = 0.5
MANY_RANKS = 32
"""From so many ranks on rank 0's messages may count."""
BENCH = "mpirun -n N python -m fedprompt_mpi bench"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked: every method with every collective and wire that go together."""

    clients: int
    nodes: int
    ranks_per_node: int
    network: Network | None
    measured_on: Network | None
    methods: list[str]
    collectives: list[str]
    wires: list[str]
    rounds: int
    """Of the whole run."""
    speeds: Speeds = EQUAL

    @property
    def is_cluster(self) -> bool:
        """True unless the network is one on which MPI would not run."""
        return self.network is None or self.network.mpi

    def placement(self, clients: int) -> Placement:
        """Return the nodes, or as many of them as a number of clients keeps busy."""
        nodes = max(1, min(self.nodes, (clients + 1) // self.ranks_per_node))
        return evenly(nodes, min(self.ranks_per_node, clients + 1), clients)


class Answer:
    """Forecasts for one question, from what was measured."""

    def __init__(self, question: Question, measured: Measured) -> None:
        """Fit the constants.

        Raises:
            SettingsError: if something was not measured, or cannot be; it says what to run.
        """
        self.question, self.measured = question, measured
        self._check()
        fitted = fit(measured, question.measured_on, question.network)
        self.links, self.network = fitted.links, fitted.links.network
        self.models = self._models(fitted)
        self.forecasts = [*self._at(question.clients)]

    def _check(self) -> None:
        asked = self.question
        if asked.nodes * asked.ranks_per_node > asked.clients + 1:
            raise SettingsError(
                f"--clients is {asked.clients}, but {asked.nodes} nodes of {asked.ranks_per_node} ranks have "
                f"{asked.nodes * asked.ranks_per_node - 1} workers, of which some would stay idle: ask for fewer "
                "nodes, or fewer ranks of each"
            )
        between = any(one.place.nodes > 1 for one in self.measured.transfers)
        if asked.network is None and asked.nodes > 1 and not between:
            raise SettingsError(
                "no source has ranks on two nodes, so nothing is known of a network: name one by --network, or run "
                f"{BENCH} over two nodes or more"
            )

    def _models(self, fitted: Fitted) -> dict[tuple[str, str, str], Model]:
        """Return method, collective and wire -> model, of those that go together.

        Raises:
            SettingsError: if none does.
        """
        found, wrong = {}, None
        asked = self.question
        for method, collective, wire in itertools.product(asked.methods, asked.collectives, asked.wires):
            run = self.measured.run_of(method, collective, wire)
            try:
                run.asked(collective, wire)
            except SettingsError as error:
                wrong = error
                continue
            found[method, collective, wire] = Model(run, fitted)
        if wrong is not None and not found:
            raise wrong
        return found

    def _at(self, clients: int, *, left_out: float = 0.0) -> Iterator[Forecast]:
        """Yield the forecast of each way at a number of clients, on as many ranks as have work."""
        place, speeds = self.question.placement(clients), self.question.speeds
        for (_, collective, wire), model in self.models.items():
            scenario = Scenario(place=place, collective=collective, wire=wire, speeds=speeds, left_out=left_out)
            yield model.forecast(scenario)

    def name_of(self, forecast: Forecast) -> str:
        """Return what tells a forecast from the others."""
        asked, scenario = self.question, forecast.scenario
        parts = [forecast.method]
        parts += [scenario.collective] if len(asked.collectives) > 1 else []
        parts += [scenario.wire] if len(asked.wires) > 1 else []
        return ", ".join(parts)

    @functools.cached_property
    def curves(self) -> dict[str, list[Forecast]]:
        """Name -> forecast at each of `GRID`."""
        found: dict[str, list[Forecast]] = {}
        for clients in GRID:
            for forecast in self._at(clients):
                found.setdefault(self.name_of(forecast), []).append(forecast)
        return found

    def saturation(self) -> dict[str, tuple[int, int] | None]:
        """Return name -> the fewest and the most clients of which vectors travel for more than half of a round."""
        found = {}
        for name, own in self.curves.items():
            there = [clients for clients, one in zip(GRID, own, strict=True) if one.on_the_link > HALF]
            found[name] = (there[0], there[-1]) if there else None
        return found

    def overtaken(self) -> dict[str, int | None]:
        """Return method -> the clients from which on reduce is faster than gather, beyond the errors of both."""
        found = {}
        for name, own in self.curves.items():
            other = self.curves.get(name.replace("gather", "reduce"), own)
            if own[0].scenario.collective == "gather" and other is not own:
                pairs = zip(own, other, strict=True)
                is_faster = [tree.moving.interval[1] < all_.moving.interval[0] for all_, tree in pairs]
                found[name.replace(", gather", "")] = from_which(is_faster)
        return found

    @functools.cached_property
    def without_slowest(self) -> dict[str, list[Forecast]]:
        """Name -> the forecast with each share of `LEFT_OUT` of the clients not waited for."""
        found: dict[str, list[Forecast]] = {}
        for share in LEFT_OUT:
            for forecast in self._at(self.question.clients, left_out=share):
                found.setdefault(self.name_of(forecast), []).append(forecast)
        return found

    def examples_lost(self) -> list[float]:
        """Return the share of the examples that the clients have which are not waited for, for each of `LEFT_OUT`.

        A run's own clients are slow because they have many examples; other speeds have nothing to do with these.
        """
        speeds = self.question.speeds
        if speeds.name != "run" or speeds.times is None:
            return [*LEFT_OUT]
        return [
            float(np.sum(speeds.times[speeds.times > speeds.limit(share)]) / speeds.times.sum()) for share in LEFT_OUT
        ]

    def extrapolations(self) -> list[str]:
        """Return what lies outside of what was measured, each with what to measure."""
        notes = [*self._beyond_the_network()]
        for (method, collective, wire), model in self.models.items():
            beyond = (*self._beyond_the_transfers(model, wire), *self._beyond_the_rounds(model, collective, wire))
            notes += [f"{method}: {note}" for note in beyond]
        return list(dict.fromkeys(notes))

    def _beyond_the_network(self) -> Iterator[str]:
        asked, links = self.question, self.links
        near = max((one.place.ranks for one in self.measured.transfers if one.place.nodes == 1), default=1)
        if asked.ranks_per_node > max(2, near):
            yield f"{asked.ranks_per_node} ranks of a node, measured with {near}: run {BENCH} on one node"
        if asked.nodes == 1:
            return
        if not links.stretch.measured:
            say = ", or say by --measured-on on which network the sources were" if asked.measured_on is None else ""
            yield f"the network is as its file states it: run {BENCH} on it{say}"
        elif asked.nodes > max(2, links.most_nodes):
            yield f"{asked.nodes:,} nodes, measured with {links.most_nodes}: run {BENCH} on more"
        if asked.nodes * asked.ranks_per_node > MANY_RANKS:
            yield f"the time between two messages at rank 0 (2 us) is an assumption: run {BENCH} on more ranks"
        if links.rate_ratio != 1:
            yield f"links {links.rate_ratio:.3g} times as fast as the measured ones: run {BENCH} on them"
        if asked.nodes > max(2, links.most_nodes) and not is_mpich(links.library):
            library = links.library[:20].strip() or "an unknown library"
            yield f"the broadcast of {library} is taken for a binomial tree: run {BENCH} on as many nodes as there are"

    def _beyond_the_transfers(self, model: Model, wire: str) -> Iterator[str]:
        place, vector = self.question.placement(self.question.clients), model.run.as_wire(wire)
        if place.nodes == 1:
            return
        largest = max((one.vector.bytes for one in self.measured.transfers if one.place.nodes > 1), default=0)
        if uses_ring(place, vector, self.links.library) and self.links.most_nodes < FEW_NODES:
            yield f"a broadcast by scatter and allgather, as MPICH's from 8 nodes on: run {BENCH} on 8"
        if 0 < 2 * largest < vector.bytes:
            yield f"vectors of {vector.bytes:,} bytes, measured up to {largest:,}: run {BENCH} --largest {vector.bytes}"

    def _beyond_the_rounds(self, model: Model, collective: str, wire: str) -> Iterator[str]:
        place, run = self.question.placement(self.question.clients), model.run
        share, then = place.most_on_a_worker, run.place.most_on_a_worker
        again = f"run {MEASURE} --prompt.method {run.method}"
        if not 0.5 <= share / then <= 2:
            more = f"{again} --federation.clients N, with some {min(share, 100)} of them a worker"
            yield f"{share:,} clients on a worker, measured with {then:,}: {more}"
        if collective != run.collective:
            yield f"no round with {collective} was measured: {again} --comm.collective {collective}"
        if wire != run.wire:
            yield f"packing as {wire} was not measured: {again} --comm.wire {wire}"


def from_which(holds: Sequence[bool]) -> int | None:
    """Return the first of `GRID` from which on something holds up to its end; None if it does not at the end."""
    held = [*itertools.takewhile(bool, reversed(holds))]
    return GRID[-len(held)] if held else None
