"""What each rank was last seen doing, for whoever has to say so when something goes wrong.

Each rank writes its phase and round down as it goes, in a table that the ranks of its node share. A rank that is killed
cannot speak, and most launchers kill the others at once; so a process of its own (this file, run as a program) watches
over the ranks of a node and outlives them: when one is gone that has not left in order, it says what they were doing.

When a rank ends the job, nobody else has anything to add, and none may stay: Open MPI takes seconds to end the ranks of
other nodes, and leaves it to them with ULFM. So the watchers of a job's nodes tell each other that it is over (by a
datagram, not by MPI, which may be what is broken), and end what is left.

The program runs beside the ranks all the time, so this file imports little.
"""

import atexit
import contextlib
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROW = struct.Struct("<iiid20s4x")
"""Process id (0 once it has left, negative once it is to be ended), rank, round, since when (seconds of the node's
monotonic clock), phase."""
FOOT = struct.Struct("<16sI")
"""Behind the rows: the job's token, with which its messages begin, and the port of this node's watcher (0: none)."""
TOKEN_BYTES = 16
PID = struct.Struct("<i")
ENDED_HERE, OVER, LOST = b"h", b"o", b"l"
"""Messages: a rank to its watcher, that it ends the job; a watcher to the others, that the job is over, and why."""
SETTLE_S = 0.05
"""So long after a rank is gone, its last words have come through, if it had any."""
ONE_EVENT_S = 1.0
"""Ranks that go so soon after another were ended because of it."""
LOOK_EVERY_S, NEVER = 0.5, float("inf")
END_WITHIN_S = 5.0
"""So long a launcher has to end the ranks of a job that one of them has ended."""


class Position:
    """Phase, round, and since when there has been no progress."""

    def __init__(self) -> None:
        """Start before everything."""
        self.phase, self.round_ = "start", 0
        self.since = time.monotonic()
        self.waits = False
        """Whether it is up to other ranks when this one goes on."""
        self.patience_s = float("inf")
        """How long this phase may take, if that is less than the settings' deadline."""
        self.has_lost_others = False
        """Whether other ranks are gone and this one went on."""
        self._table: mmap.mmap | None = None
        self._rank = self._offset = 0

    def enter(self, phase: str, round_: int, patience_s: float = float("inf")) -> None:
        """Note that a phase begins, and how long it may take if that is less than the settings' deadline."""
        self.phase, self.round_, self.waits, self.patience_s = phase, round_, False, patience_s
        self.alive()

    def alive(self) -> None:
        """Note that there is progress."""
        self.since = time.monotonic()
        if not self.is_over():
            self._write(os.getpid())

    def is_over(self) -> bool:
        """Tell whether a rank has ended the job, so that the processes of this node are about to be ended too."""
        return self._table is not None and PID.unpack_from(self._table, self._offset)[0] < 0

    def share(self, table: Path, rank: int, local_rank: int) -> None:
        """Write into a row of a file from now on.

        Args:
            table: from `make_table`.
            rank: in the job, as numbered when it was started.
            local_rank: among the ranks of the node.
        """
        self.leave()
        with table.open("r+b") as file:
            self._table = mmap.mmap(file.fileno(), 0)
        self._rank, self._offset = rank, local_rank * ROW.size
        self._write(os.getpid())
        atexit.register(self.leave)  # a program that goes on after a run that failed, and ends in order

    def leave(self) -> None:
        """Note that this process ends in order."""
        self._write(0)
        self._table = None

    def leave_all(self) -> bool:
        """Note that the job is to be ended, on this node and all others; tell whether it is for this rank to say why.

        It is not if another one has noted it before.
        """
        is_first, table, self._table = not self.is_over(), self._table, None
        if table is None:
            return True
        mark_over(table)
        token, port = FOOT.unpack_from(table, len(table) - FOOT.size)
        if is_first and port:
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
                out.sendto(token + ENDED_HERE, ("127.0.0.1", port))
        return is_first

    def _write(self, pid: int) -> None:
        if self._table is not None:
            ROW.pack_into(self._table, self._offset, pid, self._rank, self.round_, self.since, self.phase.encode()[:20])


HERE = Position()
"""This process's."""


def make_table(file: Path, ranks: int, token: bytes) -> None:
    """Make the table of a node.

    Args:
        file: a new one.
        ranks: on this node.
        token: `TOKEN_BYTES` that all nodes of the job have.
    """
    file.write_bytes(bytes(ranks * ROW.size) + FOOT.pack(token, 0))


def mark_over(table: mmap.mmap) -> None:
    """Note that the processes of a table are to be ended."""
    for at in _row_offsets(table):
        PID.pack_into(table, at, -abs(PID.unpack_from(table, at)[0]))


def _row_offsets(table: mmap.mmap) -> range:
    return range(0, len(table) - FOOT.size, ROW.size)


def port_of(table: Path) -> int:
    """Return where a table's watcher takes messages; 0 if it has none."""
    return FOOT.unpack(table.read_bytes()[-FOOT.size :])[1]


class Post:
    """The messages between the watchers of a job's nodes."""

    def __init__(self, table: mmap.mmap) -> None:
        """Open a port, and write it into the table."""
        self._token = FOOT.unpack_from(table, len(table) - FOOT.size)[0]
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("", 0))
        self.socket.setblocking(False)
        FOOT.pack_into(table, len(table) - FOOT.size, self._token, self.socket.getsockname()[1])
        self._others: list[tuple[str, int]] = []

    def meet(self, others: Iterable[tuple[str, int]]) -> None:
        """Look the others' addresses up, meanwhile: names may take long."""

        def look_up() -> None:
            for host, port in others:
                with contextlib.suppress(OSError):
                    self._others.append((socket.gethostbyname(host), port))

        threading.Thread(target=look_up, daemon=True).start()

    def send(self, message: bytes) -> None:
        """Tell all others."""
        for address in list(self._others):
            with contextlib.suppress(OSError):
                self.socket.sendto(self._token + message, address)

    def received(self) -> set[bytes]:
        """Return what has come; anything without the job's token is left out."""
        messages = set()
        with contextlib.suppress(OSError):  # no more
            while True:
                token, message = (data := self.socket.recv(64))[:TOKEN_BYTES], data[TOKEN_BYTES:]
                if token == self._token:
                    messages.add(message)
        return messages


def watch(table: mmap.mmap, offsets: dict[int, int], post: Post, *, survives: bool) -> None:
    """Watch until the last rank has gone.

    Args:
        table: of rows.
        offsets: handle of a process -> where its row is.
        post: to and from the other nodes.
        survives: whether the job goes on without ranks that are lost.
    """
    poll, quiet_until, end, why, tell_at = select.poll(), 0.0, NEVER, b"", 0.0
    for handle in (post.socket.fileno(), *offsets):
        poll.register(handle, select.POLLIN)
    while offsets:
        gone = [handle for handle, _ in poll.poll(1000 * LOOK_EVERY_S) if handle in offsets]
        before, messages = _rows(table, _row_offsets(table)), post.received()
        elsewhere = LOST in messages  # before it was here
        if not survives and _living(_rows(table, (offsets[handle] for handle in gone))):
            post.send(LOST)  # at once: the launcher is about to kill the others
        if gone:
            time.sleep(SETTLE_S)
            messages |= post.received()
        lost, seen = _living(_rows(table, (offsets[handle] for handle in gone))), _living(before)
        if seen and messages.isdisjoint({ENDED_HERE, OVER}) and time.monotonic() > quiet_until:
            if lost and not elsewhere:
                say(describe([rank for _, rank, *_ in lost], seen))
                quiet_until = time.monotonic() + ONE_EVENT_S
            elif LOST in messages and end == NEVER:
                say(describe([], seen))
        if end == NEVER and (messages or (lost and not survives) or any(row[0] < 0 for row in before)):
            end = time.monotonic() + END_WITHIN_S
            why = LOST if (lost or LOST in messages) and messages.isdisjoint({ENDED_HERE, OVER}) else OVER
        if end < NEVER:
            mark_over(table)  # again and again: a rank may have written just then
            if time.monotonic() >= tell_at:  # a datagram may be lost; not at once again, or it would come back at once
                post.send(why)
                tell_at = time.monotonic() + LOOK_EVERY_S
        if time.monotonic() > end:
            for handle in set(offsets) - set(gone):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        for handle in gone:
            poll.unregister(handle)
            os.close(handle)
            PID.pack_into(table, offsets.pop(handle), 0)


def say(line: str) -> None:
    """Print a line for the user."""
    print(line, file=sys.stderr, flush=True)


Row = tuple[int, int, int, float, bytes]
"""As `ROW` has it."""


def _rows(table: mmap.mmap, offsets: Iterable[int]) -> list[Row]:
    return [ROW.unpack_from(table, at) for at in offsets]


def _living(rows: list[Row]) -> list[Row]:
    """Return the rows of processes that have not left in order, and are not to be ended."""
    return [row for row in rows if row[0] > 0]


def describe(lost: list[int], rows: list[Row]) -> str:
    """Return which ranks of the node are gone, if any, and what each of its ranks was doing."""
    seen = "; ".join(
        f"rank {rank} in {phase.rstrip(bytes(1)).decode()} of round {round_}, for {time.monotonic() - since:.1f} s"
        for _, rank, round_, since, phase in rows
    )
    host = socket.gethostname()
    if not lost:
        return f"fedprompt_mpi: last seen on {host}: {seen}"
    names = " and ".join(f"rank {rank}" for rank in lost)
    return (
        f"fedprompt_mpi: {names} on {host} ended without a word (killed, or out of memory?); "
        f"last seen on this node: {seen}"
    )


def main() -> None:
    """Watch over the ranks of a table: FILE [survives]; once this has closed its output, they may end."""
    with Path(sys.argv[1]).open("r+b") as file:
        table = mmap.mmap(file.fileno(), 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the ranks, which may take their time
        signal.signal(number, signal.SIG_IGN)
    offsets = {}
    for at in _row_offsets(table):
        with contextlib.suppress(OSError):  # it was quicker than this
            offsets[os.pidfd_open(ROW.unpack_from(table, at)[0])] = at
    post = Post(table)
    sys.stdout.close()
    os.close(1)
    post.meet(json.loads(sys.stdin.buffer.read() or "[]"))  # nothing, if the rank that started this has ended already
    watch(table, offsets, post, survives="survives" in sys.argv[2:])


if __name__ == "__main__":
    main()
