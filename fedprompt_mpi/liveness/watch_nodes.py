"""Start a node watcher on each node of a job, and tell it the addresses of its neighbours (see `node_watcher`)."""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.liveness import node_watcher
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.node_watcher import TOKEN_BYTES, NodeTable, neighbours

MOST_ADDRESSES = 8
ADDRESS = np.dtype([("addresses", "S16", MOST_ADDRESSES), ("port", "<i4")])
"""IPv4 addresses of a node and the port of its watcher; 0 if it has none."""
HAND_OVER_WITHIN_S = 30.0
_SIOCGIFADDR = 0x8915


def watch_over(world: Any, node: Any, leaders: Any, folder: Path, liveness: Liveness) -> None:
    """Let all ranks write into their node's table, and start a watcher on each node. Every rank calls this.

    Args:
        world: communicator of all ranks.
        node: communicator of this node's ranks.
        leaders: communicator of the first rank of each node; unused on other ranks.
        folder: shared by the ranks of this node.
        liveness: of this process; its rank is the one at the start of the job.
    """
    file = folder / "table"
    token = np.frombuffer(secrets.token_bytes(TOKEN_BYTES), dtype=np.uint8).copy()
    world.Bcast(token, root=0)
    if node.rank == 0:
        NodeTable.create(file, node.size, token.tobytes())
    node.Barrier()
    table = NodeTable(file)
    liveness.share(table, node.rank)
    handles = _hand_over(node, folder)
    node.Barrier()
    if node.rank:
        return
    options = {"handles": handles, "survives": liveness.survives, "one_node": leaders.size == 1}
    watcher = _start(file, options) if handles else None
    for handle in handles:
        if handle >= 0:
            os.close(handle)
    own, everyone = np.zeros(1, dtype=ADDRESS), np.zeros(leaders.size, dtype=ADDRESS)
    found = own_addresses()[:MOST_ADDRESSES]
    own["addresses"][0, : len(found)], own["port"] = found, table.port
    leaders.Allgather(own.view(np.uint8), everyone.view(np.uint8))
    file.unlink()  # it stays mapped
    if watcher is not None:
        _introduce(watcher, everyone[neighbours(leaders.rank, leaders.size)])


def _hand_over(node: Any, folder: Path) -> list[int]:
    """Return a pidfd of each rank of the node on its first rank, [] on the others.

    Each rank opens its own pidfd and sends it over a socket: in containers, ranks of one node may be in different PID
    namespaces, where a process id means nothing to the others.
    """
    if not hasattr(os, "pidfd_open"):  # a Python built for kernels before 5.3
        return []
    own = os.pidfd_open(os.getpid())
    directory = os.open(folder, os.O_RDONLY)
    address = f"/proc/self/fd/{directory}/handles"  # the path of the folder may be too long for a socket's address
    handles = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        if node.rank == 0:
            listener.bind(address)
            listener.listen(node.size)
            listener.settimeout(HAND_OVER_WITHIN_S)
        node.Barrier()
        if node.rank == 0:
            handles = [own, *[-1] * (node.size - 1)]
            with contextlib.suppress(TimeoutError):
                for _ in range(node.size - 1):
                    with listener.accept()[0] as sender:
                        message, (handle, *_), _, _ = socket.recv_fds(sender, 4, 1)
                        handles[int.from_bytes(message, "little")] = handle
        else:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
                sender.connect(address)
                socket.send_fds(sender, [node.rank.to_bytes(4, "little")], [own])
            os.close(own)
    os.close(directory)
    return handles


def _start(table: Path, options: dict[str, Any]) -> "subprocess.Popen[bytes]":
    """Start this node's watcher, and wait until its port is in the table."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", node_watcher.__file__, str(table), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[handle for handle in options["handles"] if handle >= 0],
        start_new_session=True,  # a Ctrl-C is meant for the ranks
    )
    assert watcher.stdout is not None
    watcher.stdout.read()
    watcher.stdout.close()
    return watcher


def _introduce(watcher: "subprocess.Popen[bytes]", others: np.ndarray) -> None:
    """Tell a watcher the addresses of its neighbours, `[n]` of dtype `ADDRESS`."""
    known = [
        (address.decode(), int(other["port"]))
        for other in others
        if other["port"]
        for address in other["addresses"].tolist()
        if address
    ]
    assert watcher.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        watcher.stdin.write(json.dumps(known).encode())
        watcher.stdin.close()
    watcher.returncode = 0  # the watcher outlives this process, which does not wait for it


def own_addresses() -> list[bytes]:
    """Return the IPv4 addresses of this node's interfaces, loopback excluded.

    The name of a host is not looked up: it often means 127.0.1.1 on the host itself.
    """
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(some, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append(socket.inet_ntoa(answer[20:24]).encode())
    return [address for address in found if not address.startswith(b"127.")]
