"""How a process of a job ends, so that no rank waits for one that is gone, and no last words are lost.

A rank that has a reason to stop ends all the others through MPI: launchers disagree on what a non-zero exit status
of one rank means once MPI is up (MPICH's Hydra returned 0, 2 or 9 for the same program), but not on an abort. Slurm's
srun is the other way round: it returns the status that all ranks leave with, and 137 after an abort.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
import termios
import threading
import time
import traceback
from typing import Any, NoReturn

from fedprompt_mpi.comm.last_seen import HERE
from fedprompt_mpi.comm.launcher import SRUN, Launch, is_fault_tolerant

FAILED = 3
"""Exit status: a rank failed."""
LAST_WORDS_S = 2.0
"""How long a launcher may take to read what a rank said before it aborts."""
STAGGER_S, LONGEST_STAGGER_S = 1.0, 4.0
"""Ranks that fail at once speak one after the other by so much, so that the first one ends the job before the next."""


def end_process(status: int, *, alone: bool = False) -> NoReturn:
    """Leave MPI in order, if it runs, and end this process with an exit status.

    The interpreter is not taken apart: that takes a second, and nobody needs it. What the C library was told to do at
    exit is done: only there MPICH tells its launcher that this rank is done, and Hydra kills the others of a rank that
    has left without a word.

    Args:
        status: the exit status.
        alone: others are gone, or do not leave in order: those Open MPI with ULFM would wait for.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = _running_mpi()
    if mpi is not None and not (alone and is_fault_tolerant(mpi.get_vendor()[0])):
        mpi.Finalize()
        ctypes.PyDLL(None).exit(status)  # no other Python thread runs meanwhile
    os._exit(status)


def end_together(status: int, launch: Launch) -> NoReturn:
    """End a job all of whose ranks call this, so that its launcher returns `status`.

    Under mpirun rank 0 alone has it: Open MPI ends the job at the first other status, before rank 0 has spoken.
    """
    if launch.launcher == SRUN:
        end_process(status)
    if launch.rank == 0:
        end_job(status)
    end_process(0, alone=True)


def end_job(status: int) -> NoReturn:
    """End every rank of the job now, so that its launcher returns `status`; without MPI, end this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    HERE.leave_all()
    mpi = _running_mpi()
    if mpi is not None:
        _wait_until_read(sys.stderr.fileno())
        mpi.COMM_WORLD.Abort(status)
    os._exit(status)


def fail(launch: Launch, what: str, details: str) -> NoReturn:
    """Report that this rank failed, if no other one of its node has, and end the whole job with `FAILED`."""
    time.sleep(min(STAGGER_S * launch.rank, LONGEST_STAGGER_S))
    where = f"rank {launch.rank} of {launch.size} on {socket.gethostname()}"
    speak_for_all(f"fedprompt_mpi: {where} {what} in phase {HERE.phase} of round {HERE.round_}\n{details}")


def speak_for_all(report: str) -> NoReturn:
    """Print a report, unless another rank of this node has spoken, and end the whole job with `FAILED`."""
    if HERE.leave_all():
        print(report, end="" if report.endswith("\n") else "\n", file=sys.stderr, flush=True)
    else:
        time.sleep(LAST_WORDS_S)  # the other one ends the job
    end_job(FAILED)


class Watchdog(threading.Thread):
    """Ends the job if this rank makes no progress for too long, with what it is stuck in.

    What a rank waits for is another's to say; one that cannot say anything is found by `roll_call`.
    """

    def __init__(self, launch: Launch, deadline_s: float) -> None:
        """Watch over the thread that makes this.

        Args:
            launch: who this is.
            deadline_s: how long there may be no progress.
        """
        super().__init__(name="watchdog", daemon=True)
        self._launch, self._deadline_s = launch, deadline_s
        self._watched, self._over = threading.get_ident(), threading.Event()

    def run(self) -> None:
        """Look now and then."""
        while not self._over.wait(min(self._deadline_s / 10, 1.0)):
            since, deadline_s = HERE.since, min(self._deadline_s, HERE.patience_s)
            if not HERE.waits and time.monotonic() - since > deadline_s:
                stack = sys._current_frames().get(self._watched)
                details = "".join(traceback.format_stack(stack)) if stack else ""
                setting = " (comm.deadline_s)" if deadline_s == self._deadline_s else ""
                fail(self._launch, f"has made no progress for {deadline_s:g} s{setting}", details)

    def stop(self) -> None:
        """Let the process end as it likes."""
        self._over.set()


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
