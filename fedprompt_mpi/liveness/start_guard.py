"""A deadline for the start of MPI, enforced by a small process beside each rank.

MPI_Init waits for all ranks, some libraries in a loop that lets no Python code run: no thread and no signal handler of
the rank can end it. If another rank ends before it reaches MPI_Init, some launchers wait for ever (MPICH's Hydra, if
the exit status is 0). The guard is a fork of the rank that kills it when the deadline passes, or at once when the guard
of another rank on the same host reports that its rank has ended.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from fedprompt_mpi.liveness.clock import RunningClock
from fedprompt_mpi.liveness.exit import LAST_WORDS_S, wait_until_read
from fedprompt_mpi.liveness.node_watcher import say
from fedprompt_mpi.liveness.stop import requests
from fedprompt_mpi.start.launcher import launcher_pid

_STARTED, _OVER = b"s", b"o"
TELL_EVERY_S = 0.2


@contextlib.contextmanager
def start_guard(rank: int, size: int, deadline_s: float) -> Iterator[None]:
    """Kill this process if the block takes longer than a deadline, with a message that names the missing ranks.

    Args:
        rank: of this process.
        size: number of ranks.
        deadline_s: in seconds.
    """
    parent, names, (reading, writing) = os.getpid(), _Names(rank, size), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # threads of a numerical library: the fork runs no code of theirs
        guard = os.fork()
    if guard == 0:
        try:
            _close_all_but(reading, names.socket.fileno(), names.claim.fileno())
            _guard(parent, reading, names, deadline_s)
        finally:
            os._exit(0)
    os.close(reading)
    names.socket.close()
    names.claim.close()
    try:
        with default_signals():
            yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, _STARTED)
        os.close(writing)
        os.waitpid(guard, 0)


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """Let SIGINT end the process in the block: Python's own handler would not run inside MPI_Init."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Names:
    """Abstract socket names of the guards of one job on this host; the kernel frees a name with its process."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.launcher = launcher_pid()
        job = os.environ.get("PMIX_NAMESPACE") or self.launcher
        self._prefix = f"\0fedprompt-start-{os.getuid()}-{job}-"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def bind(self) -> None:
        with contextlib.suppress(OSError):  # somebody else's name: this rank only counts as missing
            self.socket.bind(f"{self._prefix}{self.rank}")

    def claim_report(self) -> bool:
        """Return whether this guard is the one on this host that reports; the others give it the time to do so."""
        try:
            self.claim.bind(f"{self._prefix}report")
        except OSError:  # another guard has claimed it, and tells when it has reported
            return not self.told(LAST_WORDS_S)
        return not self.told(0)

    def told(self, wait_s: float) -> bool:
        """Return whether the guard of another rank says within some seconds that the job is over."""
        return bool(select.select([self.socket], [], [], wait_s)[0])

    def present(self) -> list[int]:
        """Return the ranks whose guards run on this host."""
        return [rank for rank in range(self.size) if self._reach(rank)]

    def _reach(self, rank: int, message: bytes = b"") -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            try:
                out.connect(f"{self._prefix}{rank}")
                if message:
                    out.send(message)
            except OSError:
                return False
        return True

    def tell_others(self) -> None:
        for rank in range(self.size):
            if rank != self.rank:
                self._reach(rank, _OVER)


def _close_all_but(*kept: int) -> None:
    """Close what the rank has open: above all its connection to the launcher, which waits for its end."""
    for handle in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - numbers, not paths
        if handle > 2 and handle not in kept:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(handle)


def _guard(parent: int, reading: int, names: _Names, deadline_s: float) -> NoReturn:
    for number in requests():
        signal.signal(number, signal.SIG_DFL)
    names.bind()
    clock, ready = RunningClock(), []
    while not ready and clock() < deadline_s:
        ready, _, _ = select.select([reading, names.socket], [], [], min(1.0, deadline_s))
    ended = reading in ready
    if ended and os.read(reading, 1) == _STARTED:
        os._exit(0)
    if (ended or not ready) and names.claim_report():
        _report(_ended(names) if ended else _late(names, deadline_s))
    if ended:
        _keep_telling(names, deadline_s)
    names.tell_others()
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    os._exit(0)


def _ended(names: _Names) -> str:
    return f"fedprompt_mpi: rank {names.rank} of {names.size} on {socket.gethostname()} ended before MPI had started"


def _late(names: _Names, deadline_s: float) -> str:
    present = names.present()
    missing = sorted(set(range(names.size)) - set(present))
    return (
        f"fedprompt_mpi: MPI has not started on all ranks within {deadline_s:g} s (comm.start_deadline_s): "
        f"of {names.size} ranks, {_list(present)} waiting in MPI_Init on {socket.gethostname()}, "
        f"{_list(missing)} not there (or on another host)"
    )


def _report(line: str) -> None:
    """Print a line for the user and wait until the launcher has it: it discards what is unread when a rank ends."""
    say(line)
    wait_until_read(sys.stderr.fileno())


def _keep_telling(names: _Names, deadline_s: float) -> None:
    """Tell the other guards that the job is over, also those of ranks that start later, until the launcher ends."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):  # the launcher waits for the end of these
        os.dup2(nothing, handle)
    until = time.monotonic() + deadline_s
    while time.monotonic() < until and Path(f"/proc/{names.launcher}").exists():
        names.tell_others()
        time.sleep(TELL_EVERY_S)


def _list(ranks: list[int]) -> str:
    if not ranks:
        return "no rank is"
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"
