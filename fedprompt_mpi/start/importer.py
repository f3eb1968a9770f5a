"""The process of a node that imports everything once, and forks the ranks.

It starts no thread, no MPI and nothing of CUDA, has no open file of any rank, and ends with its last rank, or with the
process that it is kept for: a sweep has one importer for all of its runs.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from fedprompt_mpi.start import front, handover

FIRST_WITHIN_S = 60.0
"""Longest wait for the first front, which connects as soon as the importer has been forked."""
LINGER_MS = 100.0
"""Wait for a front that is late, once no rank is left."""


def fork(listener: socket.socket, kept_for: int = 0) -> None:
    """Fork the importer; it serves the fronts that connect to a listening socket.

    Args:
        listener: bound to the importer's name.
        kept_for: process at whose end the importer ends; 0: it ends with its last rank.
    """
    importer = os.fork()
    if importer:
        return
    try:
        ours = json.loads(json.dumps(handover.surroundings()))
        _detach(listener)
        _Importer(listener, ours if _import_everything() else {}, kept_for).serve()
        os._exit(0)
    finally:  # whatever happens: the fronts whose connections close do without it
        os._exit(1)


def _detach(listener: socket.socket) -> None:
    """Become a process of its own: no file of the rank that forked it, no signal meant for that one."""
    os.setsid()
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if number > 2 and number != listener.fileno():
            with contextlib.suppress(OSError):
                os.close(number)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    os.close(nothing)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a rank gets its own limit back
    for number in handover.RELAYED:
        signal.signal(number, signal.SIG_IGN)


def _import_everything() -> bool:
    """Import what ranks import; return False if they should rather do it for themselves."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a look at the GPUs by CUDA itself would make them unusable
    try:
        importlib.import_module("fedprompt_mpi.cli")
        importlib.import_module("fedprompt_mpi.commands.warm_up").warm_up()
    except BaseException:  # each rank finds the same, and reports it
        return False
    gc.collect()
    gc.freeze()  # so that no rank writes into the pages that it shares
    return _forks_alone()


def _forks_alone() -> bool:
    """Return whether a fork leaves nothing behind: libraries that have threads must end them before a fork."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208


class _Importer:
    """Forks a rank for each front that connects from the same surroundings, and tells it how the rank has ended."""

    def __init__(self, listener: socket.socket, surroundings: dict[str, Any], kept_for: int) -> None:
        self._listener, self._surroundings = listener, surroundings
        self._keeper = os.pidfd_open(kept_for) if kept_for else None
        self._ranks: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> process, its front
        self._poll = select.poll()

    def serve(self) -> None:
        """Return once keeper and last rank have ended; a front that comes later makes an importer of its own."""
        patience_ms = FIRST_WITHIN_S * 1000
        self._poll.register(self._listener, select.POLLIN)
        if self._keeper is not None:
            self._poll.register(self._keeper, select.POLLIN)
        while events := self._poll.poll(None if self._ranks or self._keeper is not None else patience_ms):
            for number, _ in events:
                if number in self._ranks:
                    self._tell_end(number)
                elif number == self._keeper:
                    self._poll.unregister(number)
                    os.close(number)
                    self._keeper = None
                else:
                    self._accept()
            patience_ms = LINGER_MS

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # no more open files: whoever waits is left to itself
            self._poll.unregister(self._listener)
            self._listener.close()
            return
        try:
            rank = self._fork_rank(connection)
        except (OSError, ValueError):  # that front has gone, or there can be no more processes
            connection.close()
            return
        if rank:
            handle = os.pidfd_open(rank)
            self._ranks[handle] = rank, connection
            self._poll.register(handle, select.POLLIN)

    def _fork_rank(self, connection: socket.socket) -> int:
        """Answer a front; return the process that was forked for its rank, 0 if none was."""
        told, files = handover.receive(connection)
        try:
            if told["surroundings"] != self._surroundings:
                connection.sendall(front.ALONE)
                return 0
            rank = os.fork()
            if rank == 0:
                self._close_all(connection)
                _run(told, files)
        finally:
            for number in files:
                os.close(number)
        connection.sendall(front.FORKED + rank.to_bytes(front.PID_BYTES, "little"))
        return rank

    def _close_all(self, connection: socket.socket) -> None:
        """Close, in a rank, what belongs to the importer and to other ranks."""
        if self._keeper is not None:
            os.close(self._keeper)
        for handle, (_, other) in self._ranks.items():
            os.close(handle)
            other.close()
        connection.close()
        self._listener.close()

    def _tell_end(self, handle: int) -> None:
        rank, connection = self._ranks.pop(handle)
        self._poll.unregister(handle)
        os.close(handle)
        _, status = os.waitpid(rank, 0)
        ended = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError), connection:  # the front may have gone before
            connection.sendall(ended.to_bytes(front.STATUS_BYTES, "little", signed=True))


def _run(told: dict[str, Any], files: list[int]) -> NoReturn:
    """Be a rank."""
    try:
        handover.take_over(told, files)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
        importlib.import_module("fedprompt_mpi.cli").main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)
