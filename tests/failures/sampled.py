"""The program, which writes down what each rank holds in each round: sampled.py FOLDER FLAGS...

FOLDER/RANK.npy gets a row a round: seconds of processor time, resident bytes, open files, MPI requests begun, and those
of them that are neither done nor cancelled.
"""

import copy
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from fedprompt_mpi import cli
from fedprompt_mpi.comm import start
from fedprompt_mpi.liveness import liveness
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.start.launcher import read_launch

MOST_ROUNDS = 10_000
BEGINNINGS = {"Ibarrier", "Ibcast", "Iallreduce", "Iallgather", "Iallgatherv", "Igather", "Igatherv", "Isend", "Irecv"}
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
samples = np.zeros((MOST_ROUNDS, 5))
open_requests: list[MPI.Request] = []
begun = itertools.count()
enter = Liveness.enter


def _noting(name: str) -> Callable[..., MPI.Request]:
    """Return a communicator's method that notes what it begins."""
    begin = getattr(MPI.Intracomm, name)

    def begin_and_note(self: MPI.Intracomm, *given: Any, **named: Any) -> MPI.Request:
        request = begin(self, *given, **named)
        open_requests.append(request)
        next(begun)
        return request

    return begin_and_note


Watched = type("Watched", (MPI.Intracomm,), {name: _noting(name) for name in dir(MPI.Intracomm) if name in BEGINNINGS})
"""A communicator that knows what it has begun; so do its duplicates."""


def enter_sampled(self: Liveness, phase: str, round_: int, *given: float) -> None:
    """Enter a phase; before each broadcast, look."""
    enter(self, phase, round_, *given)
    if phase == "broadcast":
        open_requests[:] = [request for request in open_requests if request != MPI.REQUEST_NULL]
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
        files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a path each would be memory
        samples[round_] = time.process_time(), resident, files, next(copy.copy(begun)), len(open_requests)


def start_watched(*given: Any) -> Any:
    """Start MPI, with a world that is watched."""
    start_mpi(*given)

    class _MPI:
        COMM_WORLD = Watched(MPI.COMM_WORLD)

    return _MPI


def end_sampled(status: int, **named: bool) -> None:
    """Write the samples down, and end."""
    np.save(Path(sys.argv[1]) / f"{read_launch().rank}.npy", samples[samples[:, 0] > 0])
    end_process(status, **named)


start_mpi, end_process = start.start_mpi, liveness.end_process
Liveness.enter = enter_sampled  # type: ignore[method-assign]
start.start_mpi, liveness.end_process = start_watched, end_sampled  # type: ignore[assignment]
cli.main(sys.argv[2:])
