"""How vectors travel: broadcast from rank 0, gather to rank 0, and nothing that anybody spins in.

A long wait polls a tiny non-blocking collective with a growing sleep; the vectors follow by blocking
collectives once everybody is there. So a waiting rank leaves its core to one that trains, and the time
of the collective holds (almost) no waiting. The tiny collective carries what has to travel anyway: the
round's header before a broadcast, the clients' headers before a gather.

Legend: R ranks, K clients of the round, k of them on this rank, P length of a vector.
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedprompt_mpi.comm.launcher import Launch, mismatch, transport_of
from fedprompt_mpi.comm.timing import RECORD, Timing
from fedprompt_mpi.comm.topology import MOST_PROCESSORS, Place, own_processors, read_place
from fedprompt_mpi.config import SettingsError

HEADER = np.dtype([("client", "<i4"), ("num_examples", "<i8"), ("loss", "<f8"), ("norm", "<f8"), ("train_s", "<f8")])
"""What goes with each delta."""
CHUNK_BYTES = 32 * 2**20
"""Rank 0 holds at most so much of a round's deltas at a time."""
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 2e-5, 2e-3
PROGRESS_TAG = 7
MESSAGE_BYTES = 4096


class Channel(Protocol):
    """What the federation needs of the ranks; the same over MPI and in one process."""

    rank: int
    size: int
    place: Place
    timing: Timing
    library: str
    """Name and version of the MPI library."""
    transport: str
    """What carries its messages, as far as it tells."""

    def broadcast(self, vector: np.ndarray, fingerprint: int) -> None:
        """Copy rank 0's `vector` `[P]` float32 into everybody's."""
        ...

    def gather(self, headers: np.ndarray, deltas: np.ndarray, counts: np.ndarray) -> "Gathered":
        """Bring the round's headers `[k]` and deltas `[k, P]` to rank 0, in client order.

        Args:
            headers: of dtype `HEADER`.
            deltas: float32.
            counts: `[R]` clients of every rank in this round, known to all.
        """
        ...

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Add float64 arrays of equal shape up over the ranks; everybody has the sum."""
        ...

    def agree(self, error: str | None) -> str | None:
        """Return the lowest rank's error message on every rank, or None if nobody has one."""
        ...

    def node_barrier(self) -> None:
        """Wait, asleep, for the other ranks of this node."""
        ...

    def shared_folder(self) -> Path:
        """Return a temporary folder that the ranks of this node share."""
        ...

    def drop_shared_folder(self) -> None:
        """Remove the shared folder once all ranks of the node are here; files that they have mapped live on."""
        ...

    def report_progress(self, left: int) -> None:
        """Tell rank 0, if it watches, how many local steps are left to this rank in the round."""
        ...

    def watch_progress(self, show: Callable[[int], None] | None, steps: np.ndarray) -> None:
        """Let rank 0's next waits tell `show` how many steps the rank that is last has behind it.

        Args:
            show: None if nobody watches.
            steps: `[R]` int64, the steps of each rank in this round.
        """
        ...

    def collect_timings(self) -> list[np.ndarray]:
        """Return every rank's records on rank 0, [] elsewhere."""
        ...

    def collect_text(self, text: str) -> list[str]:
        """Return every rank's short text on rank 0, [] elsewhere."""
        ...

    def close(self) -> None:
        """Leave together."""
        ...

    def abandon(self) -> None:
        """Tidy up on this rank alone, after a failure."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A round's updates as rank 0 sees them."""

    headers: np.ndarray
    """`[K]` of dtype `HEADER`, in client order (complete on every rank)."""
    blocks: Iterator[tuple[slice, np.ndarray]]
    """Pieces of the vector with all clients' deltas `[K, piece]` float32; to be exhausted on every rank."""


def chunk_columns(clients: int, size: int) -> int:
    """Return how many of P columns travel at a time, so that K rows of them fit into `CHUNK_BYTES`."""
    return max(1, min(size, CHUNK_BYTES // (4 * max(1, clients))))


class LocalChannel:
    """One process that is server and worker at once: nothing travels."""

    rank, size = 0, 1
    library, transport = "none (one process)", "none"

    def __init__(self) -> None:
        """Start with empty records."""
        self.place = read_place(0, 0, np.ones(MOST_PROCESSORS), server_here=True)
        self.timing = Timing()
        self._folder: Path | None = None
        self._show: Callable[[int], None] | None = None
        self._steps = 0

    def broadcast(self, vector: np.ndarray, fingerprint: int) -> None:
        """Nothing to do."""

    def gather(self, headers: np.ndarray, deltas: np.ndarray, counts: np.ndarray) -> Gathered:
        """Return this process's own updates, piece by piece as over MPI."""
        columns = chunk_columns(len(headers), deltas.shape[1])
        pieces = (slice(at, at + columns) for at in range(0, deltas.shape[1], columns))
        return Gathered(headers=headers, blocks=((piece, deltas[:, piece]) for piece in pieces))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the values."""
        return values

    def agree(self, error: str | None) -> str | None:
        """Return the error."""
        return error

    def node_barrier(self) -> None:
        """Nothing to do."""

    def shared_folder(self) -> Path:
        """Return a temporary folder."""
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="fedprompt-"))
        return self._folder

    def drop_shared_folder(self) -> None:
        """Remove the temporary folder."""
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def report_progress(self, left: int) -> None:
        """Show the progress at once."""
        if self._show:
            self._show(self._steps - left)

    def watch_progress(self, show: Callable[[int], None] | None, steps: np.ndarray) -> None:
        """Keep where to show the progress."""
        self._show, self._steps = show, int(steps.max())

    def collect_timings(self) -> list[np.ndarray]:
        """Return this process's records."""
        return [self.timing.take()]

    def collect_text(self, text: str) -> list[str]:
        """Return this process's text."""
        return [text]

    def abandon(self) -> None:
        """Remove the temporary folder."""
        self.drop_shared_folder()

    def close(self) -> None:
        """Remove the temporary folder."""
        self.drop_shared_folder()


class MPIChannel:
    """The ranks of an MPI job."""

    def __init__(self, world: Any, *, measure: bool) -> None:
        """Take communicators of our own, so that no other library's messages mix with ours.

        Args:
            world: an mpi4py communicator.
            measure: whether a barrier goes before each collective, to take the last bit of waiting out of its time.
        """
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = world.Dup()
        self._progress_comm = world.Dup()
        self._node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.rank, self.size = self._comm.rank, self._comm.size
        self.place = self._read_place()
        library = MPI.Get_library_version()
        self.library, self.transport = library.strip().splitlines()[0], transport_of(library)
        self.timing = Timing()
        self._measure = measure
        self._folder: Path | None = None
        self._show: Callable[[int], None] | None = None
        self._left = np.zeros(self.size, dtype=np.int64)
        self._steps = 0
        self._sending: tuple[Any, np.ndarray] | None = None
        self._watched = False
        self._last_report = 0.0

    def _read_place(self) -> Place:
        """Ask the ranks of this node who is here, and which processors each may use."""
        lowest, sharers = np.empty(1, dtype=np.int64), np.zeros(MOST_PROCESSORS, dtype=np.int64)
        self._node.Allreduce(np.array([self.rank], dtype=np.int64), lowest, op=self._mpi.MIN)
        mine = np.zeros_like(sharers)
        mine[list(own_processors())] = 1
        self._node.Allreduce(mine, sharers, op=self._mpi.SUM)
        return read_place(self.rank, self._node.rank, sharers, server_here=lowest[0] == 0)

    def _sleep_until(self, request: Any) -> None:
        """Wait for a request with the processor left to others."""
        pause = SHORTEST_SLEEP_S
        while not request.Test():
            if self._show:
                self._receive_progress()
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_SLEEP_S)

    def _collective(self, phase: str, payload_bytes: int, call: Callable[[], None]) -> None:
        """Run and time a blocking collective that everybody is about to enter."""
        if self._measure:
            with self.timing.phase("wait"):
                self._comm.Barrier()
        start = self._mpi.Wtime()
        call()
        self.timing.add(phase, self._mpi.Wtime() - start, payload_bytes)

    def broadcast(self, vector: np.ndarray, fingerprint: int) -> None:
        """Copy rank 0's `vector` `[P]` float32 into everybody's, in place.

        Raises:
            RuntimeError: if rank 0's vector has another layout than this rank's.
        """
        header = np.array([len(vector), fingerprint, self._show is not None], dtype=np.int64)
        expected = header[:2].copy()
        with self.timing.phase("wait"):
            self._sleep_until(self._comm.Ibcast(header, root=0))
        if not np.array_equal(header[:2], expected):
            raise RuntimeError(
                f"rank 0 sends a vector of {header[0]} parameters (layout {header[1]}), "
                f"but rank {self.rank} has {expected[0]} (layout {expected[1]})"
            )
        self._watched = bool(header[2])
        step = CHUNK_BYTES // 4
        for at in range(0, len(vector), step):
            piece = vector[at : at + step]
            self._collective("broadcast", piece.nbytes, lambda piece=piece: self._comm.Bcast(piece, root=0))

    def gather(self, headers: np.ndarray, deltas: np.ndarray, counts: np.ndarray) -> Gathered:
        """Bring the round's headers and deltas to rank 0, the deltas in pieces.

        Rank 0 never holds more than `CHUNK_BYTES` of them, whatever P and K.
        """
        byte = self._mpi.BYTE
        everyone = np.empty(int(counts.sum()), dtype=HEADER)
        sizes = counts * HEADER.itemsize
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        with self.timing.phase("wait"):
            # all ranks get all headers: whoever has them knows that everybody is here
            mine = np.ascontiguousarray(headers).view(np.uint8)
            self._sleep_until(self._comm.Iallgatherv([mine, byte], [everyone.view(np.uint8), sizes, starts, byte]))
        return Gathered(headers=everyone, blocks=self._gather_blocks(deltas, counts))

    def _gather_blocks(self, deltas: np.ndarray, counts: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        clients, size = int(counts.sum()), deltas.shape[1]
        columns = chunk_columns(clients, size)
        root = self.rank == 0
        for at in range(0, size, columns):
            piece = slice(at, min(at + columns, size))
            width = piece.stop - piece.start
            mine = np.ascontiguousarray(deltas[:, piece])
            block = np.empty((clients if root else 0, width), dtype=np.float32)
            sizes = counts * width
            starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
            received = [block, sizes, starts, self._mpi.FLOAT] if root else None
            self._collective(
                "gather", mine.nbytes, lambda mine=mine, received=received: self._comm.Gatherv(mine, received, root=0)
            )
            yield piece, block

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
        """Tell rank 0 how many local steps are left, a few times a second at most."""
        now = time.monotonic()
        if self.rank == 0:  # a server that trains; nobody needs to send for it
            self._left[0] = left
        if not self._watched or self.rank == 0 or now - self._last_report < 0.2:
            return
        if self._sending is not None and not self._sending[0].Test():
            return
        message = np.array([left], dtype=np.int64)
        self._sending = (self._progress_comm.Isend(message, dest=0, tag=PROGRESS_TAG), message)
        self._last_report = now

    def watch_progress(self, show: Callable[[int], None] | None, steps: np.ndarray) -> None:
        """Let rank 0's next waits tell `show` how many steps the rank that is last has behind it."""
        self._show, self._steps = show, int(steps.max())
        self._left[:] = steps

    def _receive_progress(self) -> None:
        status = self._mpi.Status()
        message = np.empty(1, dtype=np.int64)
        while self._progress_comm.Iprobe(tag=PROGRESS_TAG, status=status):
            self._progress_comm.Recv(message, source=status.Get_source(), tag=PROGRESS_TAG)
            self._left[status.Get_source()] = message[0]
        if self._show:
            self._show(self._steps - int(self._left.max()))

    def _collect_bytes(self, mine: np.ndarray) -> list[bytes]:
        """Return every rank's uint8 array as bytes on rank 0, [] elsewhere."""
        sizes = np.empty(self.size, dtype=np.int64)
        self._sleep_until(self._comm.Iallgather(np.array([mine.size], dtype=np.int64), sizes))
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        received = np.empty(int(sizes.sum()) if self.rank == 0 else 0, dtype=np.uint8)
        byte = self._mpi.BYTE
        self._comm.Gatherv([mine, byte], [received, sizes, starts, byte] if self.rank == 0 else None, root=0)
        if self.rank:
            return []
        return [received[at : at + n].tobytes() for at, n in zip(starts, sizes, strict=True)]

    def collect_timings(self) -> list[np.ndarray]:
        """Return every rank's records on rank 0, [] elsewhere."""
        return [np.frombuffer(b, dtype=RECORD) for b in self._collect_bytes(self.timing.take().view(np.uint8))]

    def collect_text(self, text: str) -> list[str]:
        """Return every rank's text on rank 0, [] elsewhere."""
        return [b.decode() for b in self._collect_bytes(np.frombuffer(text.encode(), dtype=np.uint8))]

    def abandon(self) -> None:
        """Remove the node's folder, if it is still there, waiting for nobody."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Drain what is under way, remove the node's folder, and leave together."""
        if self._sending is not None:
            self._sending[0].Cancel()
        self.drop_shared_folder()
        self._sleep_until(self._comm.Ibarrier())  # the folders are gone before any rank may end the job
        self._node.Free()
        self._progress_comm.Free()
        self._comm.Free()


def open_channel(launch: Launch, *, measure: bool) -> Channel:
    """Return the channel of this job: over MPI if a launcher started several processes, else local.

    Args:
        launch: what the launcher's environment says.
        measure: see `MPIChannel`.

    Raises:
        SettingsError: if there is no MPI library, or it is another than the launcher's.
    """
    if launch.size == 1:
        return LocalChannel()
    import mpi4py

    mpi4py.rc.initialize = False  # first see whether it can go well
    mpi4py.rc.finalize = True  # at exit
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise SettingsError(
            f"{launch.launcher} started {launch.size} processes, but mpi4py finds no MPI library ({error}): "
            "install one (pip install mpich), or load your cluster's module"
        ) from error
    wrong = mismatch(launch, MPI.get_vendor()[0])
    if wrong:
        raise SettingsError(wrong)
    if not MPI.Is_initialized():
        MPI.Init_thread()
    if launch.size != MPI.COMM_WORLD.size:
        raise SettingsError(
            f"{launch.launcher} started {launch.size} processes, but MPI sees a world of {MPI.COMM_WORLD.size}: "
            "start with the mpirun of the MPI that mpi4py is bound to"
        )
    return MPIChannel(MPI.COMM_WORLD, measure=measure)
