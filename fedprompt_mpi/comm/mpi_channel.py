"""How vectors travel between ranks: by MPI's collectives, and nothing that anybody spins in for long.

A wait polls a tiny non-blocking collective, after the first tenth of a millisecond with a growing sleep; the vectors
follow by blocking collectives once everybody is there. So a waiting rank leaves its core to one that trains, and the
time of the collective holds (almost) no waiting. The tiny collective carries what has to travel anyway: the round's
header before a broadcast, the clients' headers before a gather.

In measure mode two barriers stand between the two: one that is polled until all are there, and a tight one for what
is left of the skew (ranks wake up at different times). So the collective is timed with all ranks present. Both are
recorded as `sync`.

Legend: R ranks, K clients of the round, k of them on this rank, P length of a vector.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.channel import HEADER, NEVER, Gathered, RankLost, pieces_of
from fedprompt_mpi.comm.exact_sum import in_units, unit_of
from fedprompt_mpi.comm.last_seen import HERE
from fedprompt_mpi.comm.launcher import is_fault_tolerant, transport_of
from fedprompt_mpi.comm.progress import Progress
from fedprompt_mpi.comm.roll_call import RollCall
from fedprompt_mpi.comm.stop import is_requested
from fedprompt_mpi.comm.timing import RECORD, Timing
from fedprompt_mpi.comm.topology import MOST_PROCESSORS, Place, own_processors, read_place
from fedprompt_mpi.comm.tree import sum_to_root
from fedprompt_mpi.comm.watchers import watch_over
from fedprompt_mpi.comm.wire import FLOAT32, Wire

AWAKE_S = 1e-4
"""So long a rank looks again and again before it sleeps: those that come at one time need no sleep, after which a
collective takes microseconds longer, since the processor has forgotten the way."""
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 2e-5, 2e-3
NOTICE_WITHIN_S = 2.0
"""So soon after a collective failed, the loss that it failed for is known."""
RECOVER_WITHIN_S = 30.0
"""Survivors agree within seconds, or not at all: if one of them is ending the job instead."""
MESSAGE_BYTES = 4096


class MPIChannel:
    """The ranks of an MPI job."""

    def __init__(
        self, world: Any, *, measure: bool, deadline_s: float = NEVER, before: "MPIChannel | None" = None
    ) -> None:
        """Take communicators of our own, so that no other library's messages mix with ours.

        Args:
            world: an mpi4py communicator.
            measure: whether ranks synchronise before each collective, to take all waiting out of its time.
            deadline_s: how long a rank may be without progress before another one's waiting ends the job.
            before: the channel whose ranks, but for those that were lost, `world` has; its records go on.
        """
        from mpi4py import MPI

        self._mpi, self._world, self._deadline_s = MPI, world, deadline_s
        self._comm = world.Dup()
        self._progress = Progress(world.Dup())
        self._roll = RollCall(world.Dup(), deadline_s)
        self.rank, self.size = self._comm.rank, self._comm.size
        self.first_ranks = np.arange(self.size)
        if before is not None:
            self.first_ranks = before._first_ranks_of(world)
        self._node = self._comm.Split_type(MPI.COMM_TYPE_SHARED, key=self.rank)
        self._leaders = self._comm.Split(0 if self._node.rank == 0 else MPI.UNDEFINED, key=self.rank)
        self.nodes = self._number_nodes()
        self._folder: Path | None = None
        self.place = self._read_place()
        library = MPI.Get_library_version()
        self.library, self.transport = " ".join(library.split("\n")[0].split()), transport_of(library)
        self.thread_level = ("single", "funneled", "serialized", "multiple")[
            [MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED, MPI.THREAD_MULTIPLE].index(
                MPI.Query_thread()
            )
        ]
        self.survives = is_fault_tolerant(MPI.get_vendor()[0])
        self.timing = Timing(clock=MPI.Wtime) if before is None else before.timing
        self.clock_resolution_s = MPI.Wtick()
        self.synchronise: Callable[[], None] = lambda: None
        self.stopping = False
        self._measure = measure
        self._rooms = [np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint8)]
        first_rank = int(self.first_ranks[self.rank])
        watch_over(self._comm, self._node, self._leaders, self.shared_folder(), first_rank, survives=self.survives)

    def _number_nodes(self) -> np.ndarray:
        """Tell everybody which node each rank is on."""
        lowest, everyone = np.array([self.rank], dtype=np.int64), np.empty(self.size, dtype=np.int64)
        self._node.Bcast(lowest, root=0)
        self._comm.Allgather(lowest, everyone)
        return np.unique(everyone, return_inverse=True)[1].astype(np.int64)

    def _read_place(self) -> Place:
        """Ask the ranks of this node which processors each may use."""
        sharers, mine = np.zeros((2, MOST_PROCESSORS), dtype=np.int64)
        mine[list(own_processors())] = 1
        self._node.Allreduce(mine, sharers, op=self._mpi.SUM)
        return read_place(self.rank, self._node.rank, sharers, server_here=bool(self.nodes[self.rank] == self.nodes[0]))

    def _sleep_until(self, request: Any) -> None:
        """Wait for a request with the processor left to others; if it takes too long, ask who is missing."""
        pause, start = SHORTEST_SLEEP_S, time.monotonic()
        HERE.waits = True
        while not request.Test():
            if time.monotonic() - start < AWAKE_S:
                os.sched_yield()
                continue
            self._progress.receive()
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_SLEEP_S)
            if pause == LONGEST_SLEEP_S:
                self._roll.wait(time.monotonic() - start)
        HERE.waits = False
        HERE.alive()

    def alive(self) -> None:
        """Note that this rank makes progress, and say so to whoever asks."""
        HERE.alive()
        self._roll.answer()

    def _collective(self, phase: str, payload_bytes: int, call: Callable[..., Any], *arguments: Any) -> Any:
        """Run and time a blocking collective that everybody is about to enter; returns what it returns.

        Between the two looks at the clock there is nothing but the call: for a prompt it takes some 20 microseconds.
        """
        clock = self._mpi.Wtime
        HERE.enter(phase, self.timing.round_)
        begin = clock()
        if self._measure:
            self._sleep_until(self._comm.Ibarrier())
            self._comm.Barrier()
        start = clock()
        result = call(*arguments)
        end = clock()
        if self._measure:  # noted now: between barrier and collective it would part the ranks again
            self.timing.add("sync", start - begin)
        self.timing.add(phase, end - start, payload_bytes)
        return result

    def _meet(self) -> None:
        """Wait, asleep, until all ranks are here."""
        with self.timing.phase("wait"):
            self._sleep_until(self._comm.Ibarrier())

    def broadcast(self, vector: np.ndarray, fingerprint: int, wire: Wire = FLOAT32) -> None:
        """Copy rank 0's `vector` `[P]` float32, which is on the wire's grid, into everybody's, in place.

        Raises:
            RuntimeError: if rank 0's vector has another layout than this rank's.
        """
        header = np.array([len(vector), fingerprint, self._progress.show is not None, is_requested()], dtype=np.int64)
        expected = header[:2].copy()
        with self.timing.phase("wait"):
            self._sleep_until(self._comm.Ibcast(header, root=0))
        if not np.array_equal(header[:2], expected):
            raise RuntimeError(
                f"rank 0 sends a vector of {header[0]} parameters (layout {header[1]}), "
                f"but rank {self.rank} has {expected[0]} (layout {expected[1]})"
            )
        self._progress.is_watched, self.stopping = bool(header[2]), bool(header[3])
        size = wire.bytes_of(len(vector))
        if wire.exact:
            self.synchronise()
            self._collective("broadcast", size, self._comm.Bcast, [vector, self._mpi.FLOAT])
            return
        with self.timing.phase("pack"):
            packed = wire.pack(vector) if self.rank == 0 else self.room(0, 1, size, np.uint8)[0]
        self._collective("broadcast", size, self._comm.Bcast, [packed, self._mpi.BYTE])
        if self.rank:
            with self.timing.phase("pack"):
                wire.unpack(packed, vector)

    def gather(self, headers: np.ndarray, deltas: np.ndarray, counts: np.ndarray, wire: Wire = FLOAT32) -> Gathered:
        """Bring the round's headers and deltas, or a sum of them, to rank 0, the deltas in pieces.

        Rank 0 never holds more than two pieces of all clients' deltas, each of `CHUNK_BYTES`, whatever P and K.
        """
        byte = self._mpi.BYTE
        everyone = np.empty(int(counts.sum()), dtype=HEADER)
        sizes = counts * HEADER.itemsize
        starts = np.cumsum(sizes) - sizes
        with self.timing.phase("wait"):
            # all ranks get all headers: whoever has them knows that everybody is here
            mine = np.ascontiguousarray(headers).view(np.uint8)
            self._sleep_until(self._comm.Iallgatherv([mine, byte], [everyone.view(np.uint8), sizes, starts, byte]))
        return Gathered(
            headers=everyone,
            blocks=self._gather_blocks(deltas, counts, wire),
            sums=lambda factors: self._sums(deltas, counts, factors, everyone),
        )

    def _gather_blocks(self, deltas: np.ndarray, counts: np.ndarray, wire: Wire) -> Iterator[tuple[slice, np.ndarray]]:
        clients, root, mpi = int(counts.sum()), self.rank == 0, self._mpi
        for number, piece in enumerate(pieces_of(clients, deltas.shape[1])):
            if number:
                self._meet()  # rank 0 may still be at work on the piece before
            width = piece.stop - piece.start
            size = wire.bytes_of(width)
            with self.timing.phase("pack"):
                mine = contiguous(deltas[:, piece]) if wire.exact else wire.pack(deltas[:, piece])
                self.synchronise()
            items, kind = (width, mpi.FLOAT) if wire.exact else (size, mpi.BYTE)
            room = self.room(number % 2, clients if root else 0, items, np.float32 if wire.exact else np.uint8)
            sizes = counts * items
            starts = np.cumsum(sizes) - sizes
            received = [room, sizes, starts, kind] if root else None
            self._collective("gather", len(deltas) * size, self._comm.Gatherv, [mine, kind], received)
            if root and not wire.exact:
                with self.timing.phase("pack"):
                    numbers = np.empty((clients, width), dtype=np.float32)
                    wire.unpack(room, numbers)
                    room = numbers
            yield piece, room

    def room(self, which: int, rows: int, items: int, dtype: Any) -> np.ndarray:
        """Return one of two memories `[rows, items]` to receive in; it is kept: fresh pages cost as much as a transfer.

        Args:
            which: 0 or 1; pieces of a vector take turns.
            rows: how many.
            items: in each.
            dtype: of an item.
        """
        size = rows * items * np.dtype(dtype).itemsize
        if self._rooms[which].nbytes < size:
            self._rooms[which] = np.empty(size, dtype=np.uint8)
        return self._rooms[which][:size].view(dtype).reshape(rows, items)

    def _sums(
        self, deltas: np.ndarray, counts: np.ndarray, factors: np.ndarray, headers: np.ndarray
    ) -> Iterator[tuple[slice, np.ndarray]]:
        unit = unit_of(factors, headers["largest"])
        first = int(counts[: self.rank].sum())
        own = factors[first : first + len(deltas)]
        for piece in pieces_of(1, deltas.shape[1]):
            if piece.start:
                self._meet()
            with self.timing.phase("pack"):
                mine = in_units(deltas[:, piece], own, unit)
            rooms = [self.room(which, 1, len(mine), np.int32)[0] for which in (0, 1)]
            total = self._collective(
                "reduce", mine.nbytes, sum_to_root, self._mpi, self._node, self._leaders, mine, *rooms
            )
            yield piece, np.empty(0) if total is None else unit * total

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Add float64 arrays of equal shape up over the ranks."""
        total = np.empty_like(values)
        self._sleep_until(self._comm.Iallreduce(values, total, op=self._mpi.SUM))
        return total

    def agree(self, error: str | None) -> str | None:
        """Return the lowest rank's error message on every rank, or None if nobody has one."""
        first = np.empty(1, dtype=np.int64)
        mine = np.array([self.size if error is None else self.rank], dtype=np.int64)
        self._sleep_until(self._comm.Iallreduce(mine, first, op=self._mpi.MIN))
        if first[0] == self.size:
            return None
        message = np.zeros(MESSAGE_BYTES, dtype=np.uint8)
        if self.rank == first[0]:
            text = (error or "").encode()[:MESSAGE_BYTES]
            message[: len(text)] = np.frombuffer(text, dtype=np.uint8)
        self._comm.Bcast(message, root=int(first[0]))
        return message.tobytes().rstrip(b"\0").decode(errors="replace")

    def node_barrier(self) -> None:
        """Wait, asleep, for the other ranks of this node."""
        self._sleep_until(self._node.Ibarrier())

    def shared_folder(self) -> Path:
        """Return a temporary folder that the ranks of this node share."""
        if self._folder is None:
            name = np.zeros(MESSAGE_BYTES, dtype=np.uint8)
            if self._node.rank == 0:
                path = tempfile.mkdtemp(prefix="fedprompt-").encode()
                name[: len(path)] = np.frombuffer(path, dtype=np.uint8)
            self._sleep_until(self._node.Ibcast(name, root=0))
            self._folder = Path(name.tobytes().rstrip(b"\0").decode())
        return self._folder

    def drop_shared_folder(self) -> None:
        """Remove the node's folder once all its ranks are here."""
        self.node_barrier()
        if self._folder is not None and self._node.rank == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def report_progress(self, left: int) -> None:
        """Tell rank 0 how many local steps are left, if it watches."""
        self.alive()
        self._progress.report(left)

    def watch_progress(self, show: Callable[[int], None] | None, steps: np.ndarray) -> None:
        """Let rank 0's next waits tell `show` how many steps the rank that is last has behind it."""
        self._progress.watch(show, steps)

    def _collect_bytes(self, mine: np.ndarray) -> list[bytes]:
        """Return every rank's uint8 array as bytes on rank 0, [] elsewhere."""
        sizes = np.empty(self.size, dtype=np.int64)
        self._sleep_until(self._comm.Iallgather(np.array([mine.size], dtype=np.int64), sizes))
        starts = np.cumsum(sizes) - sizes
        received = np.empty(int(sizes.sum()) if self.rank == 0 else 0, dtype=np.uint8)
        byte = self._mpi.BYTE
        self._comm.Gatherv([mine, byte], [received, sizes, starts, byte] if self.rank == 0 else None, root=0)
        if self.rank:
            return []
        return [received[at : at + n].tobytes() for at, n in zip(starts, sizes, strict=True)]

    def collect_timings(self) -> list[np.ndarray]:
        """Return every rank's records on rank 0, [] elsewhere."""
        collected = self._collect_bytes(self.timing.take().view(np.uint8))
        self.timing.received += 1
        return [np.frombuffer(b, dtype=RECORD) for b in collected]

    def collect_text(self, text: str) -> list[str]:
        """Return every rank's text on rank 0, [] elsewhere."""
        return [b.decode() for b in self._collect_bytes(np.frombuffer(text.encode(), dtype=np.uint8))]

    def abandon(self) -> None:
        """Remove the node's folder, if it is still there, waiting for nobody."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def has_lost_a_rank(self, error: Exception) -> bool:
        """Tell whether an error means that another rank is gone and the others may go on."""
        mpi = self._mpi
        if not self.survives or not isinstance(error, mpi.Exception):
            return False
        until = time.monotonic() + NOTICE_WITHIN_S  # Open MPI's collectives may fail before they know why
        while not HERE.is_over():  # then it was ended on purpose
            if self._comm.Is_revoked() or self._comm.Get_failed().size:
                return True
            if time.monotonic() > until:
                return False
            time.sleep(SHORTEST_SLEEP_S)
        return False

    def without_the_lost(self) -> "MPIChannel":
        """Return a channel of the ranks that are left; those that still wait for the lost ones join in.

        All of a channel's communicators are revoked, which wakes everybody who waits on one; the survivors are those of
        `world`, from which each of them started.

        Raises:
            RankLost: if rank 0 is among the lost.
        """
        world, HERE.has_lost_others = self._world, True
        while True:
            HERE.enter("recover", self.timing.round_, RECOVER_WITHIN_S)
            self._revoke()
            world.Revoke()
            world = world.Shrink()
            lost = set(self.first_ranks.tolist()) - set(self._first_ranks_of(world).tolist())
            if self.first_ranks[0] in lost:
                raise RankLost("rank 0, which keeps the records, was lost")
            try:
                channel = MPIChannel(world, measure=self._measure, deadline_s=self._deadline_s, before=self)
                channel.drop_shared_folder()
            except self._mpi.Exception as error:  # another one, meanwhile
                if not self.has_lost_a_rank(error):
                    raise
            else:
                HERE.enter("prepare", self.timing.round_)
                return channel

    def _first_ranks_of(self, world: Any) -> np.ndarray:
        """Return the first numbers `[R]` int64 of the ranks of a smaller world."""
        here = world.group.Translate_ranks(None, self._world.group)
        return self.first_ranks[here]

    def _revoke(self) -> None:
        """Wake everybody who waits on a communicator of this channel, wherever that is."""
        for comm in (self._comm, self._progress.comm, self._roll.comm, self._node, self._leaders):
            if comm != self._mpi.COMM_NULL:
                comm.Revoke()

    def close(self) -> None:
        """Drain what is under way, remove the node's folder, and leave together."""
        self.drop_shared_folder()
        HERE.leave()
        self._sleep_until(self._comm.Ibarrier())  # the folders are gone before any rank may end the job
        if self._leaders != self._mpi.COMM_NULL:
            self._leaders.Free()
        self._node.Free()
        self._roll.close()
        self._progress.close()
        self._comm.Free()


def contiguous(block: Any) -> Any:
    """Return a block of an array, or of a tensor on whatever device, in one piece of memory."""
    return block.contiguous() if hasattr(block, "contiguous") else np.ascontiguousarray(block)
