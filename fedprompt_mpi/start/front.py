"""The process that the launcher started for a rank: it hands the rank over, and stands for it until it ends.

It has imported next to nothing. The first front of a node forks the importer; a front is killed with its rank and a
rank with its front, passes signals on, and ends as its rank has ended.
"""

import contextlib
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from fedprompt_mpi.start import handover, importer
from fedprompt_mpi.start.launcher import ranks_on_this_node

SWITCH = "FEDPROMPT_START"
"""Environment variable; `plain` lets each rank import for itself."""
TOGETHER = ("run", "bench", "doctor")
"""Commands that all ranks run."""
FORKED, ALONE = b"f", b"a"
"""What the importer answers: it has forked the rank, or the rank is to do everything alone."""
STATUS_BYTES = PID_BYTES = 4
_ENDED_BADLY = 1


def starts_together(arguments: Sequence[str]) -> bool:
    """Return True if the ranks of this node are to import once for all of them."""
    command = arguments[0] if arguments and not arguments[0].startswith("-") else "run"
    asks_for_text = not {"-h", "--help", "--version", "--print_config"}.isdisjoint(arguments)
    return (
        sys.platform == "linux"
        and os.environ.get(SWITCH) != "plain"
        and command in TOGETHER
        and not asks_for_text
        and ranks_on_this_node() != 1
    )


def hand_over() -> None:
    """Let the importer of this node run this rank, and end as it ends; return if this process is to do it."""
    _fill_standard_files()
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it ends this process without a traceback
    leash, held = os.pipe()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            rank = _ask(connection, leash)
            if rank:
                os.close(leash)
                _stand_for(rank, connection)
    except OSError:  # the importer has gone, or there can be none here
        pass
    os.close(leash)
    os.close(held)
    signal.signal(signal.SIGINT, interrupt)


def _fill_standard_files() -> None:
    """Open what the launcher has closed: another file would get its number, and what is printed."""
    number = 0
    while number < 3:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)


def _ask(connection: socket.socket, leash: int) -> int:
    """Return the process that the importer has forked for this rank; 0 if none."""
    connect(connection)
    handover.send(connection, leash)
    if connection.recv(1) != FORKED:
        return 0
    return int.from_bytes(connection.recv(PID_BYTES, socket.MSG_WAITALL), "little")


def connect(connection: socket.socket) -> None:
    """Connect to the importer of this node, and fork it if there is none.

    Raises:
        OSError: if that cannot be done.
    """
    name = node_name()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(name)
        except OSError:  # there is one: another front's
            pass
        else:
            listener.listen(4096)
            importer.fork(listener)
    for _ in range(100):
        try:
            connection.connect(name)
        except ConnectionRefusedError:  # it is bound, and does not listen yet
            time.sleep(0.01)
        else:
            break
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise PermissionError("that is the importer of somebody else")


def node_name() -> str:
    """Return the abstract socket name of the importer of this job on this node."""
    job = os.environ.get("PMIX_NAMESPACE")
    if "SLURM_STEP_ID" in os.environ and "PMI_FD" not in os.environ:
        job = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ['SLURM_STEP_ID']}"
    if not job:
        parent = os.getppid()
        with open(f"/proc/{parent}/stat") as file:  # noqa: PTH123 - a number may be used again, with another start time
            job = f"{parent}.{file.read().rpartition(')')[2].split()[19]}"
    return f"\0fedprompt-importer-{os.getuid()}-{job}"


def _stand_for(rank: int, connection: socket.socket) -> NoReturn:
    """Pass signals on to the process of a rank, and end as it ends."""
    for number in handover.RELAYED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: _kill(rank, number))
    signal.signal(signal.SIGTSTP, lambda *_: (_kill(rank, signal.SIGSTOP), os.kill(os.getpid(), signal.SIGSTOP)))
    signal.signal(signal.SIGCONT, lambda *_: _kill(rank, signal.SIGCONT))
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):  # the launcher waits for the end of these: they are the rank's now
        os.dup2(nothing, number)
    status = connection.recv(STATUS_BYTES, socket.MSG_WAITALL)
    if len(status) < STATUS_BYTES:  # the importer was killed
        _kill(rank, signal.SIGKILL)
        os._exit(_ENDED_BADLY)
    end_as(int.from_bytes(status, "little", signed=True))


def _kill(rank: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank, number)


def end_as(status: int) -> NoReturn:
    """End this process with an exit status, or by a signal if it is negative."""
    if status < 0:
        with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 255)
