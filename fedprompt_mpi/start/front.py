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
from collections.abc import Iterator, Sequence
from typing import NoReturn

from fedprompt_mpi.start import handover, importer
from fedprompt_mpi.start.launcher import ranks_on_this_node, read_launch

SWITCH = "FEDPROMPT_START"
"""Environment variable; `plain` lets each rank import for itself."""
KEPT_FOR = "FEDPROMPT_KEPT_FOR"
"""Environment variable; the process (`process_name`) for whose jobs one importer is kept until that process ends."""
TOGETHER = ("run", "bench", "doctor")
"""Commands that all ranks run."""
TELL_AFTER_S = (3, 10, 20, 40, 80, 160, 320)
FORKED, ALONE = b"f", b"a"
"""What the importer answers: it has forked the rank, or the rank is to do everything alone."""
STATUS_BYTES = PID_BYTES = 4
_ENDED_BADLY = 1


def say_start(arguments: Sequence[str]) -> None:
    """Say at once, on rank 0, that a job starts: it takes seconds until there is more to say."""
    if says_start(arguments):
        size = read_launch().size
        ranks = "in one process" if size == 1 else f"on {size or 'its'} ranks"
        _say(f"fedprompt_mpi starts {ranks}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody may be there to read it
        print(text, flush=True)


def says_start(arguments: Sequence[str]) -> bool:
    """Return True on the rank that says so."""
    return read_launch().rank == 0 and _command(arguments) == "run" and not _asks_for_text(arguments)


def _command(arguments: Sequence[str]) -> str:
    return arguments[0] if arguments and not arguments[0].startswith("-") else "run"


def _asks_for_text(arguments: Sequence[str]) -> bool:
    return not {"-h", "--help", "--version", "--print_config"}.isdisjoint(arguments)


def starts_together(arguments: Sequence[str]) -> bool:
    """Return True if the ranks of this node are to import once for all of them."""
    return (
        sys.platform == "linux"
        and os.environ.get(SWITCH) != "plain"
        and (
            keeper() != 0
            or (_command(arguments) in TOGETHER and not _asks_for_text(arguments) and ranks_on_this_node() != 1)
        )
    )


def hand_over() -> None:
    """Let the importer of this node run this rank, and end as it ends; return if this process is to do it."""
    _fill_standard_files()
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it ends this process without a traceback
    leash, held = os.pipe()
    for name, kept_for in _importers():
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                rank = _ask(connection, leash, name, kept_for)
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


def _importers() -> Iterator[tuple[str, int]]:
    """Yield the names of the importers that this rank may be forked by, each with the process that it is kept for."""
    if keeper():
        yield os.environ[KEPT_FOR], keeper()
    if ranks_on_this_node() != 1:
        yield job_name(), 0


def _ask(connection: socket.socket, leash: int, name: str, kept_for: int) -> int:
    """Return the process that an importer has forked for this rank; 0 if none."""
    connect(connection, name, kept_for)
    handover.send(connection, leash)
    if _answer(connection) != FORKED:
        return 0
    return int.from_bytes(connection.recv(PID_BYTES, socket.MSG_WAITALL), "little")


def _answer(connection: socket.socket) -> bytes:
    """Return what the importer answers once it has imported; say on rank 0 how long that takes already."""
    tells, began = says_start(sys.argv[1:]), time.monotonic()
    for seconds in TELL_AFTER_S if tells else ():
        connection.settimeout(max(0.01, began + seconds - time.monotonic()))
        try:
            return connection.recv(1)
        except TimeoutError:
            _say(f"importing PyTorch and transformers, once for all ranks of a node: {seconds} s")
        finally:
            connection.settimeout(None)
    return connection.recv(1)


def connect(connection: socket.socket, name: str, kept_for: int = 0) -> None:
    """Connect to an importer of this node, and fork it if there is none.

    Args:
        connection: a socket that is not connected yet.
        name: of the importer.
        kept_for: process at whose end it ends; 0: it ends with its last rank.

    Raises:
        OSError: if that cannot be done.
    """
    address = f"\0fedprompt-importer-{os.getuid()}-{name}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            listener.bind(address)
        except OSError:  # there is one: another front's
            pass
        else:
            listener.listen(4096)
            importer.fork(listener, kept_for)
    for _ in range(100):
        try:
            connection.connect(address)
        except ConnectionRefusedError:  # it is bound, and does not listen yet
            time.sleep(0.01)
        else:
            break
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise PermissionError("that is the importer of somebody else")


def job_name() -> str:
    """Return the name of the importer of this job on this node."""
    job = os.environ.get("PMIX_NAMESPACE")
    if "SLURM_STEP_ID" in os.environ and "PMI_FD" not in os.environ:
        job = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ['SLURM_STEP_ID']}"
    return job or process_name(os.getppid())


def process_name(process: int) -> str:
    """Return a name for a process of this node, such as "4711.123456": a number may be used again at another time.

    Raises:
        OSError: if there is no such process.
    """
    with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
        return f"{process}.{file.read().rpartition(')')[2].split()[19]}"


def kept_importer() -> dict[str, str]:
    """Return the environment variable by which all jobs that this process starts share one importer of this node."""
    with contextlib.suppress(OSError):
        return {KEPT_FOR: process_name(os.getpid())}
    return {}


def keeper() -> int:
    """Return the process of this node for which the importer is kept; 0 if none.

    It forks jobs of this program alone: what another program has changed before it called this one would be in all.
    """
    name = os.environ.get(KEPT_FOR, "") if _is_this_program() else ""
    with contextlib.suppress(OSError, ValueError):
        process = int(name.partition(".")[0])
        return process if process_name(process) == name else 0
    return 0


def _is_this_program() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name == "fedprompt_mpi.__main__" if spec else os.path.basename(sys.argv[0]) == "fedprompt-mpi"  # noqa: PTH119


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
