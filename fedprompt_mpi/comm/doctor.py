"""What each rank sees of its machine, as a table, and what of it will hurt."""

import collections
import dataclasses
import json
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One rank's view."""

    rank: int
    host: str
    node: int
    """As MPI groups ranks that share memory."""
    kernel: str
    """Changes with every boot of a machine: equal on two nodes, they are one machine."""
    processors: tuple[int, ...]
    """That it may run on."""
    threads: int
    device: str
    """What it would train on: cpu, or a GPU by its number on the node."""
    gpu: str
    """The GPU's unique id, or empty."""
    library: str
    transport: str
    thread_level: str
    clock_resolution_s: float
    survives: bool
    """Whether the library was started so that it survives a lost rank (ULFM)."""
    hub_cache: str
    """Folder of the hub's downloads, and what is the matter with it."""

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Rank":
        """Read it back."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "processors": tuple(fields["processors"])})


def describe_processors(processors: Sequence[int]) -> str:
    """Return processors as the kernel writes a list of them, such as 0-3,8."""
    chosen = set(processors)
    first = sorted(p for p in chosen if p - 1 not in chosen)
    last = sorted(p for p in chosen if p + 1 not in chosen)
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))


def format_ranks(ranks: Sequence[Rank]) -> str:
    """Return what is common to all, then a line a rank."""
    one = ranks[0]
    width = max(4, *(len(rank.host) for rank in ranks))
    lines = [
        f"MPI library      {one.library}",
        f"transport        {one.transport}",
        f"thread level     {one.thread_level}",
        f"clock            MPI.Wtime, resolution {one.clock_resolution_s * 1e9:.0f} ns",
        f"lost ranks       {'survived (ULFM)' if one.survives else 'end the job (no ULFM)'}",
        f"hub cache        {one.hub_cache}",
        "",
        f"rank  {'host':<{width}}  node  {'role':<6}  {'cores':<12}  threads  device",
    ]
    for rank in ranks:
        role = "server" if rank.rank == 0 and len(ranks) > 1 else "worker" if rank.rank else "both"
        lines.append(
            f"{rank.rank:>4}  {rank.host:<{width}}  {rank.node:>4}  {role:<6}  "
            f"{describe_processors(rank.processors):<12}  {rank.threads:>7}  {rank.device}"
        )
    return "\n".join(lines)


def warnings_of(ranks: Sequence[Rank]) -> list[str]:
    """Return what will hurt, one sentence each."""
    found = []
    by_node: dict[int, list[Rank]] = collections.defaultdict(list)
    for rank in ranks:
        by_node[rank.node].append(rank)
    for own in by_node.values():
        found += _crowded(own)
        hosts = sorted({rank.host for rank in own})
        if len(hosts) > 1:
            found.append(
                f"MPI takes {' and '.join(hosts)} for one node, but they have names of their own: between them it uses "
                "shared memory and not the wire, so nothing measured there is the network's"
            )
    by_gpu: dict[tuple[int, str], list[int]] = collections.defaultdict(list)
    for rank in ranks:
        if rank.gpu:
            by_gpu[rank.node, rank.gpu].append(rank.rank)
    for sharing in by_gpu.values():
        if len(sharing) > 1:
            found.append(f"ranks {_names(sharing)} train on one GPU: start one worker for each GPU, and one rank more")
    by_kernel: dict[str, set[str]] = collections.defaultdict(set)
    for rank in ranks:
        by_kernel[rank.kernel].add(rank.host)
    for hosts in by_kernel.values():
        if len(hosts) > 1:
            found.append(
                f"{' and '.join(sorted(hosts))} run on one kernel (containers or namespaces of one machine): MPI may "
                "pass shared memory for the wire between them; with MPICH and UCX, UCX_TLS=tcp,self rules that out"
            )
    for what, values in (
        ("MPI libraries", {rank.library for rank in ranks}),
        ("settings of the transport", {rank.transport for rank in ranks}),
    ):
        if len(values) > 1:
            found.append(f"the ranks have different {what}: {'; '.join(sorted(values))}")
    if any(rank.device != "cpu" for rank in ranks[1:]) and any(rank.device == "cpu" for rank in ranks[1:]):
        idle = [rank.rank for rank in ranks[1:] if rank.device == "cpu"]
        found.append(f"ranks {_names(idle)} see no GPU while other workers do: they will be waited for")
    missing = sorted({rank.host for rank in ranks if "missing" in rank.hub_cache})
    if missing and len(missing) < len({rank.host for rank in ranks}):
        found.append(f"the hub cache is missing on {', '.join(missing)}: each such node downloads the model itself")
    return found


def _crowded(own: Sequence[Rank]) -> list[str]:
    """Return what is wrong with how a node's ranks share its cores."""
    cores = {core for rank in own for core in rank.processors}
    threads = sum(rank.threads for rank in own)
    host = own[0].host
    if len(own) > len(cores):
        return [
            f"{host}: {len(own)} ranks on {len(cores)} core{'s' if len(cores) > 1 else ''}: they take turns, and times "
            "of communication hold the scheduler's"
        ]
    if threads > len(cores):
        return [f"{host}: {len(own)} ranks compute with {threads} threads on {len(cores)} cores: set OMP_NUM_THREADS"]
    pinned = collections.Counter(rank.processors for rank in own)
    crowd = [processors for processors, count in pinned.items() if count > len(processors)]
    if crowd:
        return [f"{host}: {pinned[crowd[0]]} ranks are bound to core {describe_processors(crowd[0])}: bind them apart"]
    return []


def _names(ranks: Sequence[int]) -> str:
    return " and ".join([", ".join(map(str, ranks[:-1])), str(ranks[-1])]) if len(ranks) > 1 else str(ranks[0])
