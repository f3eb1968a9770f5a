"""How a process of a job ends, so that no rank waits for one that is gone, and no last words are lost.

A rank that has a reason to stop ends all the others through MPI: launchers disagree on what a non-zero exit status
of one rank means once MPI is up (MPICH's Hydra returned 0, 2 or 9 for the same program), but not on an abort. Slurm's
srun is the other way round: it returns the status that all ranks leave with, and 137 after an abort.
"""

import fcntl
import os
import struct
import sys
import termios
import time
from typing import Any, NoReturn

from fedprompt_mpi.comm.launcher import SRUN, Launch

LAST_WORDS_S = 2.0
"""How long a launcher may take to read what a rank said before it aborts."""


def end_process(status: int) -> NoReturn:
    """Leave MPI in order, if it runs, and end this process with an exit status.

    Interpreter and torch are not taken apart: that takes each rank half a second, and nobody needs it.
    """
    mpi = _running_mpi()
    if mpi is not None:
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def end_together(status: int, launch: Launch) -> NoReturn:
    """End a job all of whose ranks call this, so that its launcher returns `status`.

    Under mpirun rank 0 alone has it: Open MPI ends the job at the first other status, before rank 0 has spoken.
    """
    if launch.launcher == SRUN:
        end_process(status)
    if launch.rank == 0:
        end_job(status)
    end_process(0)


def end_job(status: int) -> NoReturn:
    """End every rank of the job now, so that its launcher returns `status`; without MPI, end this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = _running_mpi()
    if mpi is not None:
        _wait_until_read(sys.stderr.fileno())
        mpi.COMM_WORLD.Abort(status)
    os._exit(status)


def _running_mpi() -> Any:
    """Return mpi4py's MPI module if this process has imported and started it, else None."""
    if "mpi4py.MPI" not in sys.modules:
        return None
    from mpi4py import MPI

    return MPI if MPI.Is_initialized() and not MPI.Is_finalized() else None


def _wait_until_read(pipe: int) -> None:
    """Wait, not forever, until the launcher has taken all there is in a pipe: an abort overtakes what it has not."""
    deadline = time.monotonic() + LAST_WORDS_S
    try:
        while time.monotonic() < deadline:
            (unread,) = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, struct.pack("i", 0)))
            time.sleep(0.02)  # also after the last byte: it still has to go from the launcher's helper to the launcher
            if unread == 0:
                return
    except OSError:  # no pipe: a terminal, a file
        return
