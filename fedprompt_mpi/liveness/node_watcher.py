"""The node watcher: a small process on each node that outlives the ranks and reports what they were doing.

Each rank writes its phase and round into a table that the ranks of its node share. A rank that is killed cannot report
itself, and most launchers kill the other ranks at once. The node watcher (this file, run as a program) waits for the
ranks of its node to end. If one ends without having said so in the table, the watcher prints what all of them did.

When a rank ends the job, no other rank may stay: Open MPI takes seconds to end the ranks of other nodes, and with ULFM
does not end them. So the watchers of a job tell each other that the job is over, by datagrams and not by MPI, which may
be what failed, and kill the ranks that remain. Each watcher sends to log2(N) neighbours, which pass the message on; a
node that is down does not cut the others off.

This program runs beside the ranks all the time, so it imports only a few modules of the standard library.
"""

import contextlib
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_ROW = struct.Struct("<iiid20s4x")
_FOOT = struct.Struct("<16sI")  # behind the rows: the job's token, and the port of this node's watcher (0: none)
_PID = struct.Struct("<i")
TOKEN_BYTES = 16
ENDED_HERE, OVER, LOST = b"h", b"o", b"l"
"""Messages: a rank ends the job (to its own watcher); the job is over, or over since a rank was lost (to others)."""
SETTLE_S = 0.05
"""Time that the last output of an ended process takes to arrive."""
ONE_EVENT_S = 1.0
"""Ranks that end so soon after another one ended because of it."""
LOOK_EVERY_S, NEVER = 0.5, float("inf")
END_WITHIN_S = 5.0
"""Time that a launcher gets to end the ranks of a job that is over."""


class TableRow(NamedTuple):
    """What one rank was last seen doing."""

    pid: int
    """Process id; 0 once the rank has left in order, negative once it is to be killed."""
    rank: int
    """As numbered when the job was started."""
    round: int
    since: float
    """Time of the last progress, in seconds of the node's monotonic clock."""
    phase: str


class NodeTable:
    """The table that the ranks of a node and their watcher share: a row for each rank."""

    def __init__(self, file: Path) -> None:
        """Map a table that `create` has made."""
        self._handle = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._handle, 0)
        self._foot = len(self._map) - _FOOT.size

    @staticmethod
    def create(file: Path, ranks: int, token: bytes) -> None:
        """Write an empty table for a number of ranks; all nodes of a job have the same token of `TOKEN_BYTES`."""
        file.write_bytes(bytes(ranks * _ROW.size) + _FOOT.pack(token, 0))

    def __len__(self) -> int:
        return self._foot // _ROW.size

    def read(self, local_rank: int) -> TableRow:
        """Return the row of a rank."""
        *numbers, phase = _ROW.unpack_from(self._map, local_rank * _ROW.size)
        return TableRow(*numbers, phase=phase.rstrip(b"\0").decode(errors="replace"))

    def write(self, local_rank: int, row: TableRow) -> None:
        """Replace the row of a rank."""
        _ROW.pack_into(self._map, local_rank * _ROW.size, *row[:4], row.phase.encode()[:20])

    def set_pid(self, local_rank: int, pid: int) -> None:
        """Replace the process id in the row of a rank."""
        _PID.pack_into(self._map, local_rank * _ROW.size, pid)

    def mark_over(self) -> None:
        """Mark all ranks of the node as to be killed."""
        for local_rank in range(len(self)):
            self.set_pid(local_rank, -abs(self.read(local_rank).pid))

    def claim_report(self) -> bool:
        """Return True to the first process of the node that asks for it: this one reports why the job ends."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    @property
    def token(self) -> bytes:
        """The token of the job."""
        return _FOOT.unpack_from(self._map, self._foot)[0]

    @property
    def port(self) -> int:
        """The port of this node's watcher; 0 if there is none."""
        return _FOOT.unpack_from(self._map, self._foot)[1]

    @port.setter
    def port(self, port: int) -> None:
        _FOOT.pack_into(self._map, self._foot, self.token, port)


class Links:
    """Datagrams to and from the watchers of neighbouring nodes."""

    def __init__(self, table: NodeTable, *, one_node: bool) -> None:
        """Open a port, on loopback if the job has one node only, and write it into the table."""
        self._token = table.token
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1" if one_node else "", 0))
        self.socket.setblocking(False)
        table.port = self.socket.getsockname()[1]
        self.neighbours: list[tuple[str, int]] = []
        """(IPv4 address, port); a neighbour with several addresses is listed several times."""

    def send(self, message: bytes) -> None:
        """Send a message to the neighbours."""
        for address in self.neighbours:
            with contextlib.suppress(OSError):
                self.socket.sendto(self._token + message, address)

    def received(self) -> set[bytes]:
        """Return the messages that have arrived; datagrams without the job's token are ignored."""
        messages = set()
        with contextlib.suppress(OSError):  # no more
            while True:
                token, message = (data := self.socket.recv(64))[:TOKEN_BYTES], data[TOKEN_BYTES:]
                if token == self._token:
                    messages.add(message)
        return messages


class Watcher:
    """Watches over the ranks of one node."""

    def __init__(self, table: NodeTable, handles: Sequence[int], links: Links, *, survives: bool) -> None:
        """Prepare to watch.

        Args:
            table: the node's table.
            handles: a pidfd for each row; -1 for a rank that cannot be watched.
            links: to the watchers of other nodes.
            survives: True if the job continues without lost ranks (ULFM).
        """
        self._table, self._links, self._survives = table, links, survives
        self._local_ranks = {handle: local for local, handle in enumerate(handles) if handle >= 0}
        self._quiet_until, self._end_at, self._tell_at, self._why = 0.0, NEVER, 0.0, b""

    def run(self) -> None:
        """Watch until the last rank has ended."""
        poll = select.poll()
        for handle in (self._links.socket.fileno(), *self._local_ranks):
            poll.register(handle, select.POLLIN)
        while self._local_ranks:
            gone = [handle for handle, _ in poll.poll(1000 * LOOK_EVERY_S) if handle in self._local_ranks]
            self._look(gone)
            for handle in gone:
                poll.unregister(handle)
                os.close(handle)
                self._table.set_pid(self._local_ranks.pop(handle), 0)

    def _look(self, gone: Sequence[int]) -> None:
        """Report lost ranks, pass on that the job is over, and kill ranks that stay too long after that."""
        before, messages = self._rows(range(len(self._table))), self._links.received()
        lost_elsewhere_first = LOST in messages
        if not self._survives and self._lost(gone):
            self._links.send(LOST)  # at once: the launcher is about to kill the other ranks
        if gone:
            time.sleep(SETTLE_S)
            messages |= self._links.received()
        lost, alive = self._lost(gone), [row for row in before if row.pid > 0]
        ended_by_rank = not messages.isdisjoint({ENDED_HERE, OVER})
        if alive and not ended_by_rank and time.monotonic() > self._quiet_until:
            if lost and not lost_elsewhere_first:
                say(describe([row.rank for row in lost], alive))
                self._quiet_until = time.monotonic() + ONE_EVENT_S
            elif LOST in messages and self._end_at == NEVER:
                say(describe([], alive))
        if self._end_at == NEVER and (messages or (lost and not self._survives) or any(row.pid < 0 for row in before)):
            self._end_at = time.monotonic() + END_WITHIN_S
            self._why = LOST if (lost or LOST in messages) and not ended_by_rank else OVER
        if self._end_at < NEVER:
            self._end(set(self._local_ranks) - set(gone))

    def _end(self, alive: Iterable[int]) -> None:
        self._table.mark_over()  # repeatedly: a rank may have written its row just then
        if time.monotonic() >= self._tell_at:  # repeatedly: a datagram may be lost
            self._links.send(self._why)
            self._tell_at = time.monotonic() + LOOK_EVERY_S
        if time.monotonic() > self._end_at:
            for handle in alive:
                with contextlib.suppress(OSError):  # it has ended, or is in another PID namespace
                    signal.pidfd_send_signal(handle, signal.SIGKILL)

    def _rows(self, local_ranks: Iterable[int]) -> list[TableRow]:
        return [self._table.read(local_rank) for local_rank in local_ranks]

    def _lost(self, gone: Sequence[int]) -> list[TableRow]:
        """Return the rows of processes that have ended, but neither left in order nor were to be killed."""
        return [row for row in self._rows(self._local_ranks[handle] for handle in gone) if row.pid > 0]


def say(line: str) -> None:
    """Print a line for the user."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(line, file=sys.stderr, flush=True)


def describe(lost: Sequence[int], rows: Sequence[TableRow]) -> str:
    """Return which ranks of the node are lost, if any, and what each rank of the node was doing."""
    seen = "; ".join(
        f"rank {row.rank} in {row.phase} of round {row.round}, for {time.monotonic() - row.since:.1f} s" for row in rows
    )
    host = socket.gethostname()
    if not lost:
        return f"fedprompt_mpi: last seen on {host}: {seen}"
    names = " and ".join(f"rank {rank}" for rank in lost)
    return (
        f"fedprompt_mpi: {names} on {host} ended without a word (killed, or out of memory?); "
        f"last seen on this node: {seen}"
    )


def neighbours(node: int, nodes: int) -> list[int]:
    """Return the nodes to which a node sends: those whose number differs in one bit."""
    return [other for bit in range(nodes.bit_length()) if (other := node ^ (1 << bit)) < nodes]


def main() -> None:
    """Watch over the ranks of a node: TABLE OPTIONS, where OPTIONS is JSON with handles, survives and one_node.

    The program closes its output once it is ready, then reads the addresses of its neighbours from its input, as JSON.
    """
    table, options = NodeTable(Path(sys.argv[1])), json.loads(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # signals are meant for the ranks
        signal.signal(number, signal.SIG_IGN)
    links = Links(table, one_node=options["one_node"])
    sys.stdout.close()
    os.close(1)
    told = sys.stdin.buffer.read()  # empty if the rank that started this program has ended
    links.neighbours = [(address, port) for address, port in json.loads(told or "[]")]
    Watcher(table, options["handles"], links, survives=options["survives"]).run()


if __name__ == "__main__":
    main()
