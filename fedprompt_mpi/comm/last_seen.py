"""What each rank was last seen doing, for whoever has to say so when something goes wrong.

Each rank writes its phase and round down as it goes, in a table that the ranks of its node share. A rank that is killed
cannot speak, and most launchers kill the others at once; so a process of its own (this file, run as a program) watches
over the ranks of a node and outlives them: when one is gone that has not left in order, it says what they were doing.
When one of them ends the job, it sees to it that none stays: Open MPI with ULFM leaves that to them.

The program runs beside the ranks all the time, so this file imports next to nothing.
"""

import contextlib
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

ROW = struct.Struct("<iiid20s4x")
"""Process id (0 once it has left, negative once it is to be ended), rank, round, since when (seconds of the node's
monotonic clock), phase."""
PID = struct.Struct("<i")
SETTLE_S = 0.05
"""So long after a rank is gone, its last words have come through, if it had any."""
ONE_EVENT_S = 1.0
"""Ranks that go so soon after another were ended because of it."""
LOOK_EVERY_S = 0.5
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
        if not self._is_over():
            self._write(os.getpid())

    def _is_over(self) -> bool:
        """Tell whether somebody has noted that the processes of this node are about to be ended."""
        return self._table is not None and PID.unpack_from(self._table, self._offset)[0] < 0

    def share(self, table: Path, rank: int, local_rank: int) -> None:
        """Write into a row of a file from now on.

        Args:
            table: a file of `ROW.size` bytes for each rank of the node.
            rank: in the job, as numbered when it was started.
            local_rank: among the ranks of the node.
        """
        self.leave()
        with table.open("r+b") as file:
            self._table = mmap.mmap(file.fileno(), 0)
        self._rank, self._offset = rank, local_rank * ROW.size
        self._write(os.getpid())

    def leave(self) -> None:
        """Note that this process ends in order."""
        self._write(0)
        self._table = None

    def leave_all(self) -> bool:
        """Note that all processes of this node are to be ended; tell whether it is for this one to say why.

        It is not if another one has noted it before.
        """
        is_first, table, self._table = not self._is_over(), self._table, None
        if table is None:
            return True
        for at in range(0, len(table), ROW.size):
            PID.pack_into(table, at, -abs(PID.unpack_from(table, at)[0]))
        return is_first

    def _write(self, pid: int) -> None:
        if self._table is not None:
            ROW.pack_into(self._table, self._offset, pid, self._rank, self.round_, self.since, self.phase.encode()[:20])


HERE = Position()
"""This process's."""


def start_watching(table: Path) -> None:
    """Start the program that watches over the ranks of this node, and wait until it has the table."""
    if not hasattr(os, "pidfd_open"):  # a Python made for kernels before 5.3
        return
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(table)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C is not meant for it
    )
    assert watcher.stdout is not None
    watcher.stdout.read()
    watcher.stdout.close()
    watcher.returncode = 0  # nobody waits for it


def watch(table: mmap.mmap, offsets: dict[int, int]) -> None:
    """Watch until the last rank has gone.

    Args:
        table: of rows.
        offsets: handle of a process -> where its row is.
    """
    poll, quiet_until, end = select.poll(), 0.0, float("inf")
    for handle in offsets:
        poll.register(handle, select.POLLIN)
    while offsets:
        gone = [handle for handle, _ in poll.poll(1000 * LOOK_EVERY_S)]
        before = [ROW.unpack_from(table, at) for at in range(0, len(table), ROW.size)]
        if any(row[0] < 0 for row in before):
            end = min(end, time.monotonic() + END_WITHIN_S)
        if time.monotonic() > end:
            for handle in set(offsets) - set(gone):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        if not gone:
            continue
        time.sleep(SETTLE_S)
        lost = [row for row in (ROW.unpack_from(table, offsets[handle]) for handle in gone) if row[0] > 0]
        if lost and time.monotonic() > quiet_until:
            print(
                describe([row[1] for row in lost], [row for row in before if row[0] > 0]), file=sys.stderr, flush=True
            )
            quiet_until = time.monotonic() + ONE_EVENT_S
        for handle in gone:
            poll.unregister(handle)
            os.close(handle)
            PID.pack_into(table, offsets.pop(handle), 0)


def describe(lost: list[int], rows: list[tuple[int, int, int, float, bytes]]) -> str:
    """Return who is gone, and what each rank of the node was doing."""
    seen = [
        f"rank {rank} in {phase.rstrip(bytes(1)).decode()} of round {round_}, for {time.monotonic() - since:.1f} s"
        for _, rank, round_, since, phase in rows
    ]
    names = " and ".join(f"rank {rank}" for rank in lost)
    return (
        f"fedprompt_mpi: {names} on {socket.gethostname()} ended without a word (killed, or out of memory?); "
        f"last seen on this node: {'; '.join(seen)}"
    )


def main() -> None:
    """Watch over the ranks of a table; once this has said nothing and closed its output, they may end."""
    with Path(sys.argv[1]).open("r+b") as file:
        table = mmap.mmap(file.fileno(), 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the ranks, which may take their time
        signal.signal(number, signal.SIG_IGN)
    offsets = {}
    for at in range(0, len(table), ROW.size):
        with contextlib.suppress(OSError):  # it was quicker than this
            offsets[os.pidfd_open(ROW.unpack_from(table, at)[0])] = at
    sys.stdout.close()
    os.close(1)
    watch(table, offsets)


if __name__ == "__main__":
    main()
