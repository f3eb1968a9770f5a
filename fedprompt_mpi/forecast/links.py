"""The constants of a network, from measured collectives: the seconds of a message, and of a byte.

    alpha   seconds of a message between nodes: the network's latency, and what MPI adds at both ends
    stretch seconds of a byte on a link, in units of what the link's rate and its efficiency allow
    local   seconds of a message and of a byte within a node, of each collective

They are medians: of small vectors for alpha, of large ones for the stretch. Single measurements on busy machines are
off by a factor, their median is not.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from fedprompt_mpi.comm.statistics import NORMAL_95, student_95
from fedprompt_mpi.forecast import costs
from fedprompt_mpi.forecast.costs import Cost, Placement, Vector
from fedprompt_mpi.forecast.estimate import Estimate
from fedprompt_mpi.forecast.network import Network
from fedprompt_mpi.forecast.sources import Transfer

SMALL_BYTES = 16_384
"""Vectors up to that are small: their time is that of messages."""
LARGE = 0.25
"""Share of the most bytes on a link from which a collective counts for the stretch; smaller ones differ in protocol."""
STEPS = 4
"""Of the two fits in turn; each needs the other's constant."""
LEAST_SPREAD = {"alpha": 0.3, "stretch": 0.02, "local": 0.3}
"""Relative errors are never taken for less: machines differ by that from one launch to the next."""
UNMEASURED = {"alpha": 1.0, "stretch": 0.1, "local": 1.0}
"""Relative errors of constants that nobody has measured."""
LOCAL_SECONDS, LOCAL_S_PER_BYTE = 2e-6, 2.5e-10
"""Of shared memory, where nobody has measured it."""
GAP_S = 2e-6
"""g: seconds between two messages that rank 0 receives. No bench of few nodes shows it: its error is 100 %."""
A_DOUBLING = 0.03
"""Relative error that each doubling beyond what was measured adds, of nodes and of a link's rate."""
ANOTHER_ALGORITHM, UNKNOWN_ALGORITHM = 0.1, 0.5
"""Relative errors of a broadcast whose algorithm was not measured, and of one that nobody here knows."""


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A constant in its unit, and its relative error."""

    value: float
    spread: float
    measured: bool


UNMEASURED_GAP = Constant(GAP_S, 1.0, measured=False)
Local = Mapping[str, tuple[Constant, Constant]]
"""Collective -> seconds of a message and of a byte within a node; "" for one that was not measured."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """What collectives take on a network."""

    network: Network
    alpha: Constant
    stretch: Constant
    local: Local
    library: str
    gap: Constant = UNMEASURED_GAP
    most_nodes: int
    """That were measured; 0 if none was beside another."""
    rate_ratio: float
    """Of this network's rate to the one that was measured; 1 if none was."""

    def seconds(self, collective: str, place: Placement, vector: Vector) -> Estimate:
        """Return the seconds of a collective."""
        cost = cost_of(collective, place, vector, self.library)
        wire = on_the_wire(cost, self.network)
        found = _part("alpha", self.alpha, cost.messages * self.alpha.value)
        found += _part("stretch", self.stretch, self.stretch.value * wire)
        found += _part("gap", self.gap, cost.received * self.gap.value)
        bucket = in_buckets(cost, wire, self.network)
        found += Estimate(bucket, {"bucket": abs(bucket)})
        near, relative = _within(self.local, collective, cost)
        found += Estimate(near, {"local": near * relative})
        for name, more in self._extrapolated(collective, place, vector):
            found = found.less_certain(name, more)
        return found

    def _extrapolated(self, collective: str, place: Placement, vector: Vector) -> list[tuple[str, float]]:
        """Return what is beyond what was measured, with the relative error that it adds."""
        found, known = [], max(2, self.most_nodes)
        if place.nodes > known:
            found.append(("nodes", A_DOUBLING * math.log2(place.nodes / known)))
        if place.nodes > 1 and self.rate_ratio != 1:
            found.append(("rate", A_DOUBLING * abs(math.log2(self.rate_ratio))))
        if collective == "broadcast" and uses_ring(place, vector, self.library) and known < costs.FEW_NODES:
            found.append(("algorithm", ANOTHER_ALGORITHM))
        if collective == "broadcast" and place.nodes > known and not costs.is_mpich(self.library):
            found.append(("algorithm", UNKNOWN_ALGORITHM))
        return found


def uses_ring(place: Placement, vector: Vector, library: str) -> bool:
    """Return True if a broadcast is a scatter and an allgather."""
    return place.nodes >= costs.FEW_NODES and vector.bytes >= costs.SHORT_BYTES and costs.is_mpich(library)


def _part(name: str, constant: Constant, seconds: float) -> Estimate:
    return Estimate(seconds, {name: constant.spread * seconds})


def _within(local: Local, collective: str, cost: Cost) -> tuple[float, float]:
    """Return the seconds of a collective within a node, and their relative error."""
    message, byte = local.get(collective, local[""])
    seconds = cost.local_messages * message.value + cost.local * byte.value
    return seconds, max(message.spread, byte.spread)


def cost_of(collective: str, place: Placement, vector: Vector, library: str = "MPICH") -> Cost:
    """Return the cost of one collective by its name."""
    ways: dict[str, Callable[[], Cost]] = {
        "broadcast": lambda: costs.broadcast(place, vector, library),
        "gather": lambda: costs.gather(place, vector),
        "reduce": lambda: costs.reduce(place, vector),
        "headers of gather": lambda: costs.headers(place, "gather"),
        "headers of reduce": lambda: costs.headers(place, "reduce"),
    }
    return ways[collective]()


def on_the_wire(cost: Cost, network: Network) -> float:
    """Return the seconds of a collective's bytes: on its busiest link, or on all links if these share a rate."""
    links = (
        (cost.server_up, True, True), (cost.server_down, False, True),
        (cost.node_up, True, False), (cost.node_down, False, False),
    )  # fmt: skip
    busiest = max(size * network.seconds_per_byte(up=up, server=server) for size, up, server in links)
    return max(busiest, cost.total * network.shared_s_per_byte)


def in_buckets(cost: Cost, wire: float, network: Network) -> float:
    """Return the seconds that token buckets change.

    The burst that a bucket holds at first is free. Where a message has to arrive before the next one is sent on, its
    last piece waits for the bucket to fill again: a burst, or the whole message if that is less.
    """
    burst, byte = network.contention.burst_bytes, network.busiest_s_per_byte
    if not burst or not byte:
        return 0.0
    size = wire / byte
    return byte * (cost.relays * min(burst, size / (cost.relays + 1)) - min(burst, size))


def fit_links(transfers: Sequence[Transfer], measured_on: Network | None, network: Network | None) -> Links:
    """Return the constants of a network.

    Args:
        transfers: that were measured.
        measured_on: the network on which; None if nobody says.
        network: the one that is asked about; None for the one on which was measured.
    """
    between, local = [one for one in transfers if one.place.nodes > 1], _fit_local(transfers)
    base = measured_on or as_measured(between)
    alpha, stretch = _fit(between, base, local) if between else _unmeasured(network or base)
    target, ratio = network or base, 1.0
    if between and network is not None and network != measured_on:
        if measured_on is None:
            # the rate that was found is no other network's, and of the time of a message nobody knows which part is
            # MPI's: half of it, in the middle between none and all
            stretch = Constant(1.0, UNMEASURED["stretch"], measured=False)
            alpha = Constant(network.latency_s + alpha.value / 2, UNMEASURED["alpha"], measured=False)
        else:
            software = max(0.0, alpha.value - measured_on.latency_s)
            alpha = dataclasses.replace(alpha, value=network.latency_s + software)
            ratio = measured_on.busiest_s_per_byte / network.busiest_s_per_byte
    return Links(
        network=target, alpha=alpha, stretch=stretch, local=local, rate_ratio=ratio,
        library=next((one.library for one in transfers), "MPICH"),
        most_nodes=max((one.place.nodes for one in between), default=0),
    )  # fmt: skip


def as_measured(between: Sequence[Transfer]) -> Network:
    """Return the network that measured collectives show; one that takes no time if none was between nodes."""
    wires = [(one.seconds / wire, wire) for one in between if (wire := _cost(one).wire) > SMALL_BYTES]
    rate = math.inf
    if wires:
        largest = max(wire for _, wire in wires)
        rate = 8e-6 / statistics.median(byte for byte, wire in wires if wire >= LARGE * largest)
    return Network(
        name="as measured", latency_us=0.0, up_mbit=rate, down_mbit=rate, efficiency=1.0, source="the sources"
    )


def _cost(one: Transfer) -> Cost:
    return cost_of(one.collective, one.place, one.vector, one.library)


def _unmeasured(network: Network) -> tuple[Constant, Constant]:
    return Constant(network.latency_s, UNMEASURED["alpha"], False), Constant(1.0, UNMEASURED["stretch"], False)


def _fit(between: Sequence[Transfer], network: Network, local: Local) -> tuple[Constant, Constant]:
    """Fit alpha and the stretch in turn, each as a median."""
    rows = []
    for one in between:
        cost = _cost(one)
        wire = on_the_wire(cost, network)
        beside = in_buckets(cost, wire, network) + cost.received * GAP_S + _within(local, one.collective, cost)[0]
        rows.append((one.seconds - beside, cost.messages, wire, one.vector.bytes <= SMALL_BYTES))
    alpha, stretch = _unmeasured(network)
    most = max(wire for _, _, wire, _ in rows)
    for _ in range(STEPS):
        small = [max(0.0, s - stretch.value * wire) / count for s, count, wire, is_small in rows if is_small]
        if small:
            alpha = _median(small, LEAST_SPREAD["alpha"])
        large = [(s - alpha.value * n) / wire for s, n, wire, is_small in rows if not is_small and wire >= LARGE * most]
        if large:
            stretch = _median(large, LEAST_SPREAD["stretch"])
    return alpha, stretch


def _median(values: Sequence[float], least: float) -> Constant:
    """Return a median with the relative error of the next value.

    The deviation is that of a normal distribution with the same mean absolute deviation, by Student's t wider of few
    values, and wider by that of the median itself, whose variance is pi / 2 that of a mean.
    """
    middle, count = statistics.median(values), len(values)
    spread = math.sqrt(math.pi / 2) * statistics.fmean(abs(value - middle) for value in values)
    if count > 1:
        spread *= student_95(count - 1) / NORMAL_95 * math.sqrt(1 + math.pi / 2 / count)
    return Constant(middle, max(least, spread / middle) if middle > 0 else 1.0, measured=True)


def _fit_local(transfers: Sequence[Transfer]) -> Local:
    """Return the constants within a node."""
    unknown = (LOCAL_SECONDS, LOCAL_S_PER_BYTE)
    none = Constant(unknown[0], UNMEASURED["local"], False), Constant(unknown[1], UNMEASURED["local"], False)
    found, near = {"": none}, [one for one in transfers if one.place.nodes == 1]
    for name in dict.fromkeys(one.collective for one in near):
        own = [(one, _cost(one)) for one in near if one.collective == name]
        message, byte, most = *none, max(cost.local for _, cost in own)
        small = [(one, cost) for one, cost in own if one.vector.bytes <= SMALL_BYTES and cost.local_messages]
        if small:
            message = _median([one.seconds / cost.local_messages for one, cost in small], LEAST_SPREAD["local"])
        large = [(one, cost) for one, cost in own if one.vector.bytes > SMALL_BYTES and cost.local >= LARGE * most > 0]
        if large:
            rates = [max(0.0, one.seconds - cost.local_messages * message.value) / cost.local for one, cost in large]
            byte = _median(rates, LEAST_SPREAD["local"])
        found[name] = (message, byte)
    return found
