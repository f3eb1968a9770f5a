"""Starts a watcher on each node of a job (see `last_seen`), and makes them known to each other."""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm import last_seen
from fedprompt_mpi.comm.last_seen import HERE, TOKEN_BYTES, make_table, port_of

ADDRESS = np.dtype([("host", "S256"), ("port", "<i4")])
"""Where a node's watcher takes messages; port 0 if it has none."""


def watch_over(world: Any, node: Any, leaders: Any, folder: Path, rank: int, *, survives: bool) -> None:
    """Let all ranks write down what they do, and a watcher on each node look after them; every rank calls this.

    Args:
        world: communicator of all ranks.
        node: of this node's.
        leaders: of the first rank of each node; not used by others.
        folder: of this node.
        rank: this one's, as numbered when the job was started.
        survives: whether the job goes on without ranks that are lost.
    """
    table = folder / "last_seen"
    token = np.frombuffer(secrets.token_bytes(TOKEN_BYTES), dtype=np.uint8).copy()
    world.Bcast(token, root=0)
    if node.rank == 0:
        make_table(table, node.size, token.tobytes())
    node.Barrier()
    HERE.share(table, rank, node.rank)
    node.Barrier()
    if node.rank == 0:
        watcher = _start(table, survives)
        own, everyone = np.zeros(1, dtype=ADDRESS), np.zeros(leaders.size, dtype=ADDRESS)
        own["host"], own["port"] = socket.gethostname().encode(), port_of(table)
        leaders.Allgather(own.view(np.uint8), everyone.view(np.uint8))
        table.unlink()  # who needs it has it mapped
        if watcher is not None:
            _introduce(watcher, np.delete(everyone, leaders.rank))


def _start(table: Path, survives: bool) -> subprocess.Popen[bytes] | None:
    """Start this node's watcher, and wait until it has the table; it begins once it is introduced to the others."""
    if not hasattr(os, "pidfd_open"):  # a Python made for kernels before 5.3
        return None
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", last_seen.__file__, str(table), *(["survives"] if survives else [])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is not meant for it
    )
    assert watcher.stdout is not None
    watcher.stdout.read()
    watcher.stdout.close()
    return watcher


def _introduce(watcher: subprocess.Popen[bytes], others: np.ndarray) -> None:
    """Tell a watcher where the others are, `[nodes - 1]` of dtype `ADDRESS`."""
    known = [[bytes(at["host"]).decode(), int(at["port"])] for at in others if at["port"]]
    assert watcher.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        watcher.stdin.write(json.dumps(known).encode())
        watcher.stdin.close()
    watcher.returncode = 0  # nobody waits for it
