"""The command doctor: where the ranks are, on which cores and GPUs, over which MPI, and warnings."""

import collections
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.placement import MPILibrary, bind_device, describe_processors, own_processors, thread_count
from fedprompt_mpi.comm.start import open_channel
from fedprompt_mpi.commands.settings import command_parser, parse
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.start.launcher import read_launch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankView:
    """What one rank sees of its machine."""

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
    mpi: MPILibrary
    hub_cache: str
    """Folder of the hub's downloads."""
    hub_cache_exists: bool
    hub_offline: bool

    def to_json(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RankView":
        """Read it back."""
        fields: dict[str, Any] = json.loads(text)
        fields["processors"], fields["mpi"] = tuple(fields["processors"]), MPILibrary(**fields["mpi"])
        return cls(**fields)


def main(arguments: Sequence[str], liveness: Liveness) -> None:
    """Print the table and the warnings."""
    parse(command_parser("doctor", "where the ranks are, on which cores and GPUs, over which MPI"), arguments)
    channel = open_channel(read_launch(), liveness)
    everyone = channel.collect(look_around(channel).to_json().encode())
    if everyone:
        ranks = [RankView.from_json(text.decode()) for text in everyone]
        print(format_ranks(ranks), flush=True)
        for warning in warnings_of(ranks):
            print(f"warning: {warning}", flush=True)
    channel.close()


def look_around(channel: Channel) -> RankView:
    """Return what this rank sees of its machine."""
    import torch
    from huggingface_hub import constants

    placement, gpu = channel.placement, ""
    trains = channel.rank > 0 or channel.size == 1
    device = bind_device(torch.cuda.device_count(), placement, is_worker=trains)
    if device != "cpu":
        gpu = str(torch.cuda.get_device_properties(device).uuid)
    return RankView(
        rank=channel.rank,
        host=placement.host,
        node=int(placement.nodes[channel.rank]),
        kernel=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        processors=tuple(sorted(own_processors())),
        threads=thread_count(placement, os.environ.get("OMP_NUM_THREADS"), one_client_a_pass=False),
        device=device,
        gpu=gpu,
        mpi=placement.mpi,
        hub_cache=constants.HF_HUB_CACHE,
        hub_cache_exists=Path(constants.HF_HUB_CACHE).is_dir(),
        hub_offline=bool(constants.HF_HUB_OFFLINE),
    )


def format_ranks(ranks: Sequence[RankView]) -> str:
    """Return a table: what all ranks have in common, then a line per rank."""
    one = ranks[0]
    width = max(4, *(len(rank.host) for rank in ranks))
    lines = [
        f"MPI library      {one.mpi.library}",
        f"transport        {one.mpi.transport}",
        f"thread level     {one.mpi.thread_level}",
        f"clock            monotonic, resolution {one.mpi.clock_resolution_s * 1e9:.0f} ns",
        f"lost ranks       {'survived (ULFM)' if one.mpi.survives else 'end the job (no ULFM)'}",
        f"hub cache        {one.hub_cache}{'' if one.hub_cache_exists else ' (missing)'}"
        f"{' (offline)' if one.hub_offline else ''}",
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


def warnings_of(ranks: Sequence[RankView]) -> list[str]:
    """Return warnings, one sentence each."""
    found = []
    by_node: dict[int, list[RankView]] = collections.defaultdict(list)
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
        ("MPI libraries", {rank.mpi.library for rank in ranks}),
        ("settings of the transport", {rank.mpi.transport for rank in ranks}),
    ):
        if len(values) > 1:
            found.append(f"the ranks have different {what}: {'; '.join(sorted(values))}")
    if any(rank.device != "cpu" for rank in ranks[1:]) and any(rank.device == "cpu" for rank in ranks[1:]):
        idle = [rank.rank for rank in ranks[1:] if rank.device == "cpu"]
        found.append(f"ranks {_names(idle)} see no GPU while other workers do: they will be waited for")
    missing = sorted({rank.host for rank in ranks if not rank.hub_cache_exists})
    if missing and len(missing) < len({rank.host for rank in ranks}):
        found.append(f"the hub cache is missing on {', '.join(missing)}: each such node downloads the model itself")
    return found


def _crowded(own: Sequence[RankView]) -> list[str]:
    """Return warnings about how the ranks of a node share its cores."""
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
