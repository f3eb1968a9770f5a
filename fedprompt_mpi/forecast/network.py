"""A network: what it can carry, as a small TOML file states it.

latency_us      one way, between two nodes, in microseconds
up_mbit, down_mbit  rate of a node's link, in 10^6 bits a second
efficiency      share of the rate that is left for vectors; by default for TCP in full Ethernet frames
nodes, ranks_per_node  what the cluster has; flags of the command may ask for less or more
mpi             false where MPI would not run: only bytes and their time on the links are told
source          where the figures come from
[server]        up_mbit, down_mbit of the node of rank 0, if they differ
[contention]    what nodes share: total_mbit, the rate of all links together; cores, if the nodes are one machine;
                burst_bytes, which a token bucket lets through at once
"""

import dataclasses
import importlib.resources
from pathlib import Path
from typing import Any

from fedprompt_mpi.config import SettingsError
from fedprompt_mpi.files import read_toml
from fedprompt_mpi.rules.setting import typed

LEAST, MOST = 1e-6, 1e9
"""Of any figure, in its unit."""
TCP_EFFICIENCY = 1448 / 1538
"""Content of a TCP segment to all that a full Ethernet frame takes on the line: headers, checksum, preamble, gap."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Rates of one node's link, in 10^6 bits a second."""

    up_mbit: float
    down_mbit: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contention:
    """What nodes share."""

    total_mbit: float | None = None
    """Rate of all links together; None if each has its own."""
    cores: int | None = None
    """Of all nodes together; None if each rank has its own."""
    burst_bytes: int = 0
    """Bytes that a link lets through at once before its rate holds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network of nodes with equal links."""

    name: str
    latency_us: float
    up_mbit: float
    down_mbit: float
    source: str
    efficiency: float = TCP_EFFICIENCY
    nodes: int | None = None
    ranks_per_node: int = 1
    mpi: bool = True
    server: Link | None = None
    contention: Contention = Contention()

    @property
    def latency_s(self) -> float:
        """One way, in seconds."""
        return self.latency_us * 1e-6

    def seconds_per_byte(self, *, up: bool, server: bool) -> float:
        """Return the seconds that a byte of a vector takes on a node's link, in one direction."""
        link = self.server if server and self.server is not None else self
        return 8e-6 / (link.up_mbit if up else link.down_mbit) / self.efficiency

    @property
    def busiest_s_per_byte(self) -> float:
        """Seconds of a byte on the slowest of a node's and the server's links."""
        links = ((up, server) for up in (True, False) for server in (True, False))
        return max(self.seconds_per_byte(up=up, server=server) for up, server in links)

    @property
    def shared_s_per_byte(self) -> float:
        """Seconds of a byte where all links together are limited; 0 if they are not."""
        total = self.contention.total_mbit
        return 0.0 if total is None else 8e-6 / total / self.efficiency


def presets() -> list[str]:
    """Return the names of the networks that come with the package."""
    folder = importlib.resources.files("fedprompt_mpi.forecast") / "networks"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_network(named: str, flag: str = "--network", *, runs_mpi: bool = False) -> Network:
    """Return a preset by its name, or what a TOML file states.

    Args:
        named: the one or the other.
        flag: that names it, for the message.
        runs_mpi: True if MPI has run on it, or is to.

    Raises:
        SettingsError: naming the file, the figure and the remedy.
    """
    file = Path(named)
    if named in presets():
        file = Path(str(importlib.resources.files("fedprompt_mpi.forecast"))) / "networks" / f"{named}.toml"
    try:
        network = typed(Network, _known(read_toml(file)))
        _check(network)
    except FileNotFoundError as error:
        raise SettingsError(
            f"{flag} is {named!r}, which is neither a file nor one of {', '.join(presets())}: name one of these"
        ) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SettingsError(f"{flag}: {named} cannot be read as a network ({reason})") from error
    if runs_mpi and not network.mpi:
        raise SettingsError(
            f"{flag} is {named!r}, where MPI would not run: name the network on which ranks were, or are"
        )
    return network


def _known(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table as it is; raise ValueError if it has a figure that a network does not have."""
    parts = {
        "": (table, Network),
        "server": (table.get("server"), Link),
        "contention": (table.get("contention"), Contention),
    }
    for part, (own, kind) in parts.items():
        names = {field.name for field in dataclasses.fields(kind)}
        for name in own if isinstance(own, dict) else ():
            if name not in names:
                raise ValueError(
                    f"{part and f'{part}.'}{name} is no figure of a network: it has {', '.join(sorted(names))}"
                )
    return table


def _check(network: Network) -> None:
    """Raise ValueError for a figure that no network can have."""
    links = {"": network, "server.": network.server}
    rates = {
        f"{part}{name}": getattr(link, name)
        for part, link in links.items()
        if link
        for name in ("up_mbit", "down_mbit")
    }
    total = network.contention.total_mbit
    positive = {**rates, "nodes": network.nodes, "ranks_per_node": network.ranks_per_node,
                "contention.total_mbit": total, "contention.cores": network.contention.cores}  # fmt: skip
    for name, value in positive.items():
        if value is not None and not LEAST <= value <= MOST:
            raise ValueError(f"{name} is {value}: give a number above 0")
    for name, value in (("latency_us", network.latency_us), ("contention.burst_bytes", network.contention.burst_bytes)):
        if not 0 <= value <= MOST:
            raise ValueError(f"{name} is {value}: give a number from 0")
    if not 0 < network.efficiency <= 1:
        raise ValueError(f"efficiency is {network.efficiency}: give a share above 0, at most 1")
