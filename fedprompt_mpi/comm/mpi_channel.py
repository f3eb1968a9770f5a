"""Transport between ranks by MPI's collectives. A rank that waits long sleeps between polls.

A wait polls a small non-blocking collective, after the first millisecond with a growing sleep. The vectors
follow by blocking collectives once all ranks have arrived. So a waiting rank leaves its core to one that trains, and
the time of a collective contains (almost) no waiting.

In measure mode two barriers stand between the two: one that is polled until all ranks have arrived, and a tight one
for the rest of the skew (ranks wake up at different times). So the collective is timed with all ranks present. Both
are recorded as `sync`.

Legend: R ranks, K rows of all ranks, k rows of this rank, P length of a vector.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.channel import Chunks, RankLost
from fedprompt_mpi.comm.chunks import chunks_of
from fedprompt_mpi.comm.codec import FLOAT32, Codec
from fedprompt_mpi.comm.communicators import Communicators
from fedprompt_mpi.comm.device import Vector, contiguous, synchronise
from fedprompt_mpi.comm.progress import Progress
from fedprompt_mpi.comm.temporary import explained, make_folder, remove_folder
from fedprompt_mpi.comm.timing import Phases, Timing
from fedprompt_mpi.comm.tree import sum_to_root
from fedprompt_mpi.liveness.liveness import Liveness
from fedprompt_mpi.liveness.stalled import NOT_WAITING, StalledRanks
from fedprompt_mpi.liveness.watch_nodes import watch_over

AWAKE_S = 1e-3
"""Time of polling without sleep. After a sleep a collective takes microseconds longer: caches are cold."""
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 1e-4, 2e-3
SLEEP_SHARE = 0.02
"""A sleep in the time already waited: what a rank may come late by, against what its polling costs the others."""
NOTICE_WITHIN_S = 2.0
"""Time until MPI knows of the lost rank for which a collective has failed."""
RECOVER_WITHIN_S = 30.0
"""Survivors agree within seconds, or never: if one of them ends the job instead."""
TRANSFER_GRACE_S = 5.0
"""Time beyond the deadline after which a rank in a blocking collective reports: the one it waits for reports before."""
MESSAGE_BYTES = 4096
MOST_AT_ONCE_BYTES = 2**30
"""Larger vectors are broadcast in pieces."""


class MPIChannel:
    """The ranks of an MPI job. The methods are those of `Channel`."""

    def __init__(self, world: Any, liveness: Liveness, *, measure: bool = False) -> None:
        """Open the channel; every rank of `world` calls this.

        Args:
            world: an mpi4py communicator.
            liveness: of this process.
            measure: True if ranks synchronise before each collective, to take all waiting out of its time.
        """
        from mpi4py import MPI

        self._mpi, self._measure, self._liveness = MPI, measure, liveness
        self.phases = Phases(Timing(), liveness)
        self._collectives = 0
        self.start_together: Callable[[], float] = self._after_barrier
        """In measure mode: lets all ranks, once they are there, start a collective; returns the time of the start."""
        self.started = 0.0
        """Time at which the last collective of vectors began."""
        self._folder: Path | None = None
        self._folder_lock: int | None = None
        self._buffers = [np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint8)]
        self._open(world, np.arange(world.size))

    def _open(self, world: Any, original_ranks: np.ndarray) -> None:
        """Connect the ranks of a communicator, `[R]` int64 numbered as at the start of the job."""
        self._comms, liveness = Communicators(self._mpi, world), self._liveness
        self._comm, self._node = self._comms.comm, self._comms.node
        self.rank, self.size = self._comm.rank, self._comm.size
        self.placement = self._comms.placement(original_ranks)
        screen = self.progress.screen if hasattr(self, "progress") else None  # after the loss of a rank
        self.progress = Progress(self._mpi, self._comms.progress)
        self.progress.screen = screen
        self._stalled = StalledRanks(self._mpi, self._comms.stalled, liveness)
        liveness.survives, liveness.answer = self.placement.mpi.survives, self._stalled.answer
        liveness.one_node = not self.placement.nodes.any()
        with self.node_folder() as folder:
            watch_over(self._comm, self._node, self._comms.leaders, folder, liveness)

    def _sleep_until(self, request: Any, name: str, *, goes_on: bool = False, of_all: bool = True) -> None:
        """Wait for a request and leave the processor to others; after a long wait ask which rank is missing.

        Args:
            request: what is waited for.
            name: of the collective, for a message.
            goes_on: True if it is the same collective, to the ranks that wait in it, as the one before.
            of_all: False if some ranks are not in it, and may wait in the next one.
        """
        clock = self._liveness.clock
        start = clock()
        self._collectives += of_all and not goes_on
        self._liveness.wait_in(self._collectives if of_all else NOT_WAITING, name)
        while not request.Test():
            waited = clock() - start
            if waited < AWAKE_S:
                os.sched_yield()
                continue
            self.progress.receive()
            time.sleep(min(max(SHORTEST_SLEEP_S, SLEEP_SHARE * waited), LONGEST_SLEEP_S))
            if waited > LONGEST_SLEEP_S / SLEEP_SHARE:
                self._stalled.wait(waited)
        self._liveness.arrived()

    def _collective(self, phase: str, payload_bytes: int, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run and time a blocking collective that every rank is about to enter; return its result.

        Between the two readings of the clock there is only the call: for a prompt it takes some 20 microseconds.
        """
        clock, patience_s = time.perf_counter, self._liveness.deadline_s + TRANSFER_GRACE_S
        self._liveness.enter(phase, self.phases.timing.round, patience_s)
        begin = start = clock()
        if self._measure:
            self._sleep_until(self._comm.Ibarrier(), phase)
            start = self.start_together()
        result = call(*arguments)
        end = clock()
        self.started = start
        if self._measure:  # recorded now: between barrier and collective it would part the ranks again
            self.phases.timing.add("sync", start - begin)
        self.phases.timing.add(phase, end - start, payload_bytes)
        return result

    def _after_barrier(self) -> float:
        self._comm.Barrier()
        return time.perf_counter()

    def _meet(self, name: str) -> None:
        """Wait, asleep, until all ranks have arrived."""
        with self.phases.time("wait"):
            self._sleep_until(self._comm.Ibarrier(), name)

    def tell(self, values: np.ndarray, root: int = 0) -> None:
        """Copy a small array of one rank into everybody's, in place."""
        self._sleep_until(self._comm.Ibcast(values, root=root), "tell")

    def broadcast(self, vector: Vector, codec: Codec = FLOAT32) -> None:
        """Copy rank 0's vector into everybody's, in place."""
        size = codec.bytes_of(len(vector))
        if codec.exact:
            synchronise(vector)
            self._broadcast(size, [vector, self._mpi.FLOAT])
            return
        with self.phases.time("pack"):
            packed = codec.pack(vector) if self.rank == 0 else self.buffer(0, 1, size, np.uint8)[0]
        self._broadcast(size, [packed, self._mpi.BYTE])
        if self.rank:
            with self.phases.time("pack"):
                codec.unpack(packed, vector)

    def _broadcast(self, size: int, buffer: list[Any]) -> None:
        """Copy rank 0's vector of so many bytes: not all MPI libraries take more than 2^31 at once."""
        whole = size <= MOST_AT_ONCE_BYTES
        self._collective("broadcast", size, self._comm.Bcast if whole else self._broadcast_pieces, buffer)

    def _broadcast_pieces(self, buffer: list[Any]) -> None:
        vector, kind = buffer
        items = MOST_AT_ONCE_BYTES // kind.size
        for at in range(0, len(vector), items):
            self._comm.Bcast([vector[at : at + items], kind])

    def consult(
        self, rows: np.ndarray, counts: np.ndarray, answer: Callable[[np.ndarray], Any], told: np.ndarray
    ) -> np.ndarray:
        """Gather small rows at rank 0, and tell every rank what it answers."""
        root, byte, sizes = self.rank == 0, self._mpi.BYTE, counts * rows.dtype.itemsize
        everyone = np.empty(int(counts.sum()) if root else 0, dtype=rows.dtype)
        received = [everyone.view(np.uint8), sizes, np.cumsum(sizes) - sizes, byte] if root else None
        mine = [np.ascontiguousarray(rows).view(np.uint8), byte]
        self._sleep_until(self._comm.Igatherv(mine, received), "consult")
        if root:
            told[:] = answer(everyone)
        self._sleep_until(self._comm.Ibcast(told), "consult", goes_on=True)
        return everyone if root else rows

    def gather(self, rows: Vector, counts: np.ndarray, codec: Codec = FLOAT32, phase: str = "gather") -> Chunks:
        """Yield chunks of all ranks' vectors on rank 0, which holds two chunks of at most `CHUNK_BYTES` at a time."""
        total, root, mpi = int(counts.sum()), self.rank == 0, self._mpi
        kind, dtype = (mpi.BYTE, np.uint8)
        if codec.exact:
            kind, dtype = (mpi.UINT32_T, np.uint32) if rows.dtype == np.uint32 else (mpi.FLOAT, np.float32)
        for number, chunk in enumerate(chunks_of(total, rows.shape[1])):
            if number:
                self._meet(phase)  # rank 0 may still aggregate the chunk before
            width = chunk.stop - chunk.start
            size = codec.bytes_of(width)
            with self.phases.time("pack"):
                mine = contiguous(rows[:, chunk]) if codec.exact else codec.pack(rows[:, chunk])
                synchronise(mine)
            items = width if codec.exact else size
            buffer, sizes = self.buffer(number % 2, total if root else 0, items, dtype), counts * items
            received = [buffer, sizes, np.cumsum(sizes) - sizes, kind] if root else None
            self._collective(phase, len(rows) * size, self._comm.Gatherv, [mine, kind], received)
            if root and not codec.exact:
                with self.phases.time("pack"):
                    numbers = np.empty((total, width), dtype=np.float32)
                    codec.unpack(buffer, numbers)
                    buffer = numbers
            yield chunk, buffer

    def scatter(self, rows: np.ndarray, counts: np.ndarray, size: int) -> Chunks:
        """Yield chunks of this rank's rows of those that rank 0 has."""
        kind, own = self._mpi.FLOAT, int(counts[self.rank])
        for chunk in chunks_of(int(counts.sum()), size):
            width = chunk.stop - chunk.start
            sizes, mine = counts * width, np.empty((own, width), dtype=np.float32)
            sent = [contiguous(rows[:, chunk]), sizes, np.cumsum(sizes) - sizes, kind] if self.rank == 0 else None
            self._meet("scatter")
            self._comm.Scatterv(sent, [mine, kind])
            yield chunk, mine

    def buffer(self, which: int, rows: int, items: int, dtype: Any) -> np.ndarray:
        """Return one of two receive buffers `[rows, items]`. It is kept: fresh pages cost as much as a transfer.

        Args:
            which: 0 or 1; the chunks of a vector take turns.
            rows: number of rows.
            items: in each row.
            dtype: of an item.
        """
        size = rows * items * np.dtype(dtype).itemsize
        if self._buffers[which].nbytes < size:
            self._buffers[which] = np.empty(size, dtype=np.uint8)
        return self._buffers[which][:size].view(dtype).reshape(rows, items)

    def reduce(self, words: Callable[[slice], np.ndarray], size: int) -> Chunks:
        """Yield chunks of the sum of all ranks' words modulo 2^32 on rank 0."""
        for chunk in chunks_of(1, size):
            if chunk.start:
                self._meet("reduce")
            with self.phases.time("pack"):
                mine = words(chunk)
            buffers = [self.buffer(which, 1, len(mine), np.uint32)[0] for which in (0, 1)]
            total = self._collective("reduce", mine.nbytes, sum_to_root, self._comms, mine, *buffers)
            yield chunk, np.empty(0, dtype=np.uint32) if total is None else total.copy()  # the buffer is used again

    def connect(self, ranks: np.ndarray) -> None:
        """Give some ranks a communicator of their own."""
        self._meet("connect")
        self._comms.connect(ranks)

    def share(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the rows of all connected ranks, on each of these."""
        group, total = self._comms.group, int(counts.sum())
        if group == self._mpi.COMM_NULL:
            return rows
        own = counts[self._comms.members]
        everyone = np.empty((total, rows.shape[1]), dtype=np.float32)
        for chunk in chunks_of(total, rows.shape[1]):
            self._sleep_until(group.Ibarrier(), "share", of_all=False)
            width = chunk.stop - chunk.start
            received, sizes = np.empty((total, width), dtype=np.float32), own * width
            group.Allgatherv(
                [contiguous(rows[:, chunk]), self._mpi.FLOAT],
                [received, sizes, np.cumsum(sizes) - sizes, self._mpi.FLOAT],
            )
            everyone[:, chunk] = received
        return everyone

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 arrays of equal shape over the ranks."""
        total = np.empty_like(values)
        self._sleep_until(self._comm.Iallreduce(values, total, op=self._mpi.SUM), "sum")
        return total

    def agree(self, error: str | None) -> str | None:
        """Return the lowest rank's error message on every rank, or None if no rank has one."""
        first = np.empty(1, dtype=np.int64)
        mine = np.array([self.size if error is None else self.rank], dtype=np.int64)
        self._sleep_until(self._comm.Iallreduce(mine, first, op=self._mpi.MIN), "agree")
        if first[0] == self.size:
            return None
        message = _as_bytes(error or "")
        self._comm.Bcast(message, root=int(first[0]))
        return _as_text(message)

    def collect(self, data: bytes, phase: str | None = None) -> list[bytes]:
        """Return the data of every rank on rank 0, [] elsewhere."""
        sizes, byte = np.empty(self.size, dtype=np.int64), self._mpi.BYTE
        with contextlib.nullcontext() if phase is None else self.phases.time("wait"):
            self._sleep_until(self._comm.Iallgather(np.array([len(data)], dtype=np.int64), sizes), "collect")
        starts = np.cumsum(sizes) - sizes
        received = np.empty(int(sizes.sum()) if self.rank == 0 else 0, dtype=np.uint8)
        sent = [np.frombuffer(data, dtype=np.uint8), byte]
        into = [received, sizes, starts, byte] if self.rank == 0 else None
        if phase is None:
            self._comm.Gatherv(sent, into)
        else:
            self._collective(phase, len(data), self._comm.Gatherv, sent, into)
        if self.rank:
            return []
        return [received[at : at + n].tobytes() for at, n in zip(starts, sizes, strict=True)]

    def deal(self, parts: list[bytes], phase: str) -> bytes:
        """Return this rank's part of what rank 0 has for every rank."""
        byte, sizes = self._mpi.BYTE, np.zeros(self.size, dtype=np.int64)
        if self.rank == 0:
            sizes[:] = [len(part) for part in parts]
        with self.phases.time("wait"):
            self.tell(sizes)
        everything = np.frombuffer(b"".join(parts), dtype=np.uint8)
        mine = np.empty(int(sizes[self.rank]), dtype=np.uint8)
        sent = [everything, sizes, np.cumsum(sizes) - sizes, byte] if self.rank == 0 else None
        self._collective(phase, len(mine), self._comm.Scatterv, sent, [mine, byte])
        return mine.tobytes()

    @contextlib.contextmanager
    def node_folder(self) -> Iterator[Path]:
        """Share a temporary folder among the ranks of this node during the block.

        If the block fails, `close(alone=True)` removes the folder, after the rank has claimed the report.
        """
        name = np.zeros(MESSAGE_BYTES, dtype=np.uint8)
        if self._node.rank == 0:
            folder, self._folder_lock = make_folder()
            name = _as_bytes(str(folder))
        self._sleep_until(self._node.Ibcast(name, root=0), "node_folder")
        self._folder = Path(_as_text(name))
        with explained(self._folder):
            yield self._folder
        self._sleep_until(self._node.Ibarrier(), "node_folder")
        self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None and self._folder_lock is not None:
            remove_folder(self._folder, self._folder_lock)
        self._folder, self._folder_lock = None, None

    def recover(self, error: Exception) -> bool:
        """Continue with the remaining ranks if an error means that a rank was lost; return False if it does not."""
        if not self.has_lost_a_rank(error):
            return False
        self._shrink()
        return True

    def has_lost_a_rank(self, error: Exception) -> bool:
        """Return True if an error means that a rank was lost and the others may continue (ULFM)."""
        mpi = self._mpi
        if not self.placement.mpi.survives or not isinstance(error, mpi.Exception):
            return False
        until = time.monotonic() + NOTICE_WITHIN_S  # Open MPI's collectives may fail before they know why
        while not self._liveness.is_over():  # a job that is over was ended on purpose
            if self._comm.Is_revoked() or self._comm.Get_failed().size:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(SHORTEST_SLEEP_S)
        return False

    def _shrink(self) -> None:
        """Connect the remaining ranks; ranks that still wait for the lost ones join in.

        All communicators are revoked, which wakes every rank that waits on one. The remaining ranks connect and agree
        that all of them have: if one more rank was lost meanwhile, all of them shrink again.
        """
        before, ranks, live = self._comms.world, self.placement.original_ranks, self._liveness
        world, live.has_lost_others, self._folder = before, True, None
        while True:
            live.enter("recover", self.phases.timing.round, min(RECOVER_WITHIN_S, live.deadline_s))
            self._comms.revoke()
            world.Revoke()
            world = world.Shrink()
            remaining = ranks[world.group.Translate_ranks(None, before.group)]
            if ranks[0] not in remaining:
                raise RankLost("rank 0, which keeps the records, was lost")
            connected = False
            try:
                self._open(world, remaining)
                connected = True
            except self._mpi.Exception:
                if not world.Is_revoked() and not world.Get_failed().size:
                    raise
                world.Revoke()
            if self._all_have(world, connected):
                live.enter("prepare", self.phases.timing.round)
                return

    def _all_have(self, world: Any, connected: bool) -> bool:
        """Return True if all ranks of a smaller world are connected: the same answer on each of them."""
        try:
            return bool(world.Agree(int(connected)))
        except self._mpi.Exception:  # a rank was lost; Agree tells all of the others
            return False

    def close(self, *, alone: bool = False) -> None:
        """Leave the channel, together with all other ranks, or alone after a failure."""
        if alone:
            self._remove_folder()
            return
        try:
            self._leave_together()
        except self._mpi.Exception as error:  # a rank that is lost now is not needed
            if not self.has_lost_a_rank(error):
                raise
            self._remove_folder()

    def _leave_together(self) -> None:
        if self._folder is not None:  # all ranks have left its block by the same error
            self._sleep_until(self._node.Ibarrier(), "node_folder")
            self._remove_folder()
        self._liveness.leave()
        # on another communicator than the collectives: one that a rank still waits in cannot match it
        self._sleep_until(self._comms.progress.Ibarrier(), "close")
        self._stalled.close()
        self.progress.close()
        self._comms.free()


def _as_bytes(text: str) -> np.ndarray:
    """Return a text as `[MESSAGE_BYTES]` uint8, cut or padded with zeros."""
    message = np.zeros(MESSAGE_BYTES, dtype=np.uint8)
    encoded = text.encode()[:MESSAGE_BYTES]
    message[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
    return message


def _as_text(message: np.ndarray) -> str:
    return message.tobytes().rstrip(b"\0").decode(errors="replace")
