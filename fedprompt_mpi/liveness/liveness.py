"""The liveness of one process: its progress, its deadline, a request to stop, and how the job ends.

There is one `Liveness` for each run, made by the command line or by `run`. The command line ends the whole job when a
rank fails or stalls (`ends_job`). In a library call nothing ends the process: an exception is raised instead.
"""

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from fedprompt_mpi.liveness.clock import RunningClock
from fedprompt_mpi.liveness.exit import FAILED, FINALIZED_WITHIN_S, LAST_WORDS_S, die_after, end_job, end_process
from fedprompt_mpi.liveness.node_watcher import ENDED_HERE, NodeTable, TableRow
from fedprompt_mpi.liveness.output import printable
from fedprompt_mpi.liveness.stop import StopRequest
from fedprompt_mpi.liveness.watchdog import StalledError, Watchdog

NEVER = float("inf")
STAGGER_S, LONGEST_STAGGER_S = 1.0, 4.0
"""Ranks of several nodes that fail at once report one after the other, so that the first ends the job for all."""
REPORT_WITHIN_S = 10.0
"""Time in which a rank that has claimed the report prints it."""


class Liveness:
    """What this process does, until when it must do something else, and how it ends."""

    def __init__(
        self, *, rank: int = 0, size: int | None = 1, ends_job: bool = False, under_srun: bool = False
    ) -> None:
        """Start before everything.

        Args:
            rank: of this process at the start of the job.
            size: number of ranks at the start of the job; None until MPI has told it.
            ends_job: True if a failure ends the whole job (command line), False if it is raised (library).
            under_srun: True if the launcher returns the status with which all ranks end.
        """
        self.rank, self.size, self.ends_job, self._under_srun = rank, size or 0, ends_job, under_srun
        self.stop = StopRequest()
        self.deadline_s = NEVER
        """Longest time without progress, in seconds."""
        self.survives = False
        """True if the job continues without lost ranks (ULFM)."""
        self.has_lost_others = False
        """True if other ranks were lost and this one went on."""
        self.one_node = False
        """True if all ranks are on one node."""
        self.phase, self.round = "start", 0
        self.collective: tuple[int, str] | None = None
        """Number and name of the collective in which this rank waits for others; None if it does not wait."""
        self.patience_s: float | None = None
        """Longest duration of this phase, if that is not the deadline."""
        self.since = time.monotonic()
        """Time of the last progress, on the node's clock."""
        self.clock = RunningClock()
        self.ran_since = self.clock()
        """The same on the clock of this process, which stands still while it does not run."""
        self.answer: Callable[[], None] = lambda: None
        """Answers ranks that ask whether this one is alive; set by the channel."""
        self._table: NodeTable | None = None
        self._local_rank, self._has_left = 0, False
        self._reports: bool | None = None

    # progress

    def enter(self, phase: str, round_: int, patience_s: float | None = None) -> None:
        """Note that a phase begins. Only the thread that the watchdog watches calls this.

        Args:
            phase: its name.
            round_: the round it belongs to.
            patience_s: its longest duration, if that is not the deadline.
        """
        self.phase, self.round, self.collective, self.patience_s = phase, round_, None, patience_s
        self.alive()

    def alive(self) -> None:
        """Note that there is progress; any thread may call this."""
        self.since, self.ran_since = time.monotonic(), self.clock()
        if not self.is_over():
            self._write(os.getpid())

    def step(self) -> None:
        """Note a step of long work, and answer ranks that ask; only the thread that uses MPI calls this."""
        self.alive()
        self.answer()

    def wait_in(self, number: int, name: str) -> None:
        """Note that this rank waits for the others in a collective."""
        self.collective = number, name

    def arrived(self) -> None:
        """Note that all ranks have reached the collective."""
        self.collective = None
        self.alive()

    @contextlib.contextmanager
    def watched(self, deadline_s: float) -> Iterator[None]:
        """Run the block with a watchdog over this thread.

        Args:
            deadline_s: longest time without progress; it counts from now.

        Raises:
            StalledError: in a library call, if a deadline has passed.
        """
        self.deadline_s = deadline_s
        self.alive()
        watchdog = Watchdog(self, threading.get_ident())
        watchdog.start()
        try:
            yield
        finally:
            watchdog.stop()

    # the table of the node

    def share(self, table: NodeTable, local_rank: int) -> None:
        """Write the progress into a row of the node's table from now on."""
        self.leave()
        self._table, self._local_rank, self._has_left = table, local_rank, False
        self._write(os.getpid())
        atexit.register(self.leave)

    def leave(self) -> None:
        """Note that this process ends in order; from now on it writes no progress."""
        self._write(0)
        self._has_left = True
        atexit.unregister(self.leave)

    def is_over(self) -> bool:
        """Return True if a rank has ended the job, so that this process is about to be killed."""
        return self._table is not None and self._table.read(self._local_rank).pid < 0

    def _write(self, pid: int) -> None:
        if self._table is not None and not self._has_left:
            self._table.write(self._local_rank, TableRow(pid, self.rank, self.round, self.since, self.phase))

    # the end

    def claim_report(self) -> bool:
        """Return True if this rank is to report why the job ends: no other rank of its node has claimed that.

        A rank that fails claims the report before it removes anything that other ranks use. So the first cause is
        reported, and not what follows from it.
        """
        if self._reports is None:
            self._reports = self._table is None or (not self.is_over() and self._table.claim_report())
        return self._reports

    def fail(self, what: str, details: str) -> NoReturn:
        """Report that this rank failed, unless another rank reports, and end the whole job with `FAILED`."""
        of = f" of {self.size}" if self.size else ""
        where = f"rank {self.rank}{of} on {socket.gethostname()}"
        self._report(f"fedprompt_mpi: {where} {what} in phase {self.phase} of round {self.round}\n{details}")

    def stalled(self, message: str) -> NoReturn:
        """End the job since ranks make no progress; in a library call, raise.

        Raises:
            StalledError: in a library call.
        """
        if not self.ends_job:
            raise StalledError(message)
        self._report(f"fedprompt_mpi: {message}")

    def _report(self, report: str) -> NoReturn:
        if not self.claim_report():
            self._wait_for_the_report()
        elif not self.one_node:
            time.sleep(min(STAGGER_S * self.rank, LONGEST_STAGGER_S))
        if self._reports and not self.is_over():
            self._mark_over()
            print(printable(report), end="" if report.endswith("\n") else "\n", file=sys.stderr, flush=True)
        end_job(FAILED)

    def _wait_for_the_report(self) -> None:
        until = time.monotonic() + REPORT_WITHIN_S
        while not self.is_over() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(LAST_WORDS_S)

    def _mark_over(self) -> None:
        """Tell the ranks of this node and, through its watcher, those of other nodes that the job is over."""
        table, self._table = self._table, None
        if table is None:
            return
        table.mark_over()
        if table.port:
            with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
                out.sendto(table.token + ENDED_HERE, ("127.0.0.1", table.port))

    def end_together(self, status: int) -> NoReturn:
        """End a job all of whose ranks call this, so that its launcher returns `status`.

        All ranks finalize MPI, so that MPICH has nothing to say of its own. Under mpirun rank 0 alone ends with the
        status: Open MPI, which says so in any case, ends the job at the first one that is not 0.
        """
        if self._under_srun:
            end_process(status)
        if self.survives:  # Open MPI with ULFM would wait for ranks that are gone
            if self.rank == 0:
                self.end_job(status)
            end_process(0, others_left=True)
        if self.rank == 0:
            self._mark_over()
            die_after(FINALIZED_WITHIN_S)
        end_process(status if self.rank == 0 else 0)

    def end_job(self, status: int) -> NoReturn:
        """End every rank of the job now, so that its launcher returns `status`."""
        self._mark_over()
        end_job(status)

    def end(self) -> NoReturn:
        """End this process with status 0."""
        end_process(0, others_left=self.survives and self.has_lost_others)
