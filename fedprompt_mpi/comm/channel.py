"""How vectors travel, as the federation sees it: broadcast from rank 0, gather or sum at rank 0.

`MPIChannel` does it between the ranks of a job, `LocalChannel` does the same in one process, to the bit.

Legend: R ranks, K clients of the round, k of them on this rank, P length of a vector.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedprompt_mpi.comm.launcher import Launch, mismatch, set_transport
from fedprompt_mpi.comm.timing import Timing
from fedprompt_mpi.comm.topology import Place
from fedprompt_mpi.comm.wire import FLOAT32, INT8_CHUNK, Wire
from fedprompt_mpi.config import SettingsError

HEADER = np.dtype(
    [
        ("client", "<i4"),
        ("num_examples", "<i8"),
        ("loss", "<f8"),
        ("norm", "<f8"),
        ("largest", "<f8"),
        ("train_s", "<f8"),
        ("asked_to_stop", "?"),
        ("given_up", "?"),
    ]
)
"""What goes with each delta: `norm` and `largest` are its Euclidean and its maximum norm; `given_up` says that it is
none, since its rank has been asked to stop and may break off."""
NEVER = float("inf")
CHUNK_BYTES = 64 * 2**20
"""Large vectors go in pieces; rank 0 holds two pieces of all clients, each of at most so many bytes."""


class RankLost(Exception):  # noqa: N818 - what happened to another
    """A rank is gone, under a launcher that lets the others go on (ULFM); raised on every rank that notices."""


class Channel(Protocol):
    """What the federation needs of the ranks; the same over MPI and in one process."""

    rank: int
    size: int
    first_ranks: np.ndarray
    """`[R]` int64: each rank's number when the job was started, with those that were lost since."""
    place: Place
    nodes: np.ndarray
    """`[R]` int64: the node of each rank, from 0 in the order of their lowest ranks."""
    timing: Timing
    library: str
    """Name and version of the MPI library."""
    transport: str
    """What carries its messages, as far as it tells."""
    thread_level: str
    """How threads may use MPI."""
    survives: bool
    """Whether the job was started so that it survives a lost rank (ULFM)."""
    clock_resolution_s: float
    """Of the clock that phases are timed with."""
    stopping: bool
    """Whether rank 0 had been asked to stop when it last broadcast."""
    synchronise: Callable[[], None]
    """Called before a device's memory is handed to MPI: waits for the device. Set by whoever owns the device."""

    def broadcast(self, vector: np.ndarray, fingerprint: int, wire: Wire = FLOAT32) -> None:
        """Copy rank 0's `vector` `[P]` float32, which is on the wire's grid, into everybody's."""
        ...

    def gather(self, headers: np.ndarray, deltas: np.ndarray, counts: np.ndarray, wire: Wire = FLOAT32) -> "Gathered":
        """Bring the round's headers `[k]` and deltas `[k, P]` to rank 0, in client order.

        Args:
            headers: of dtype `HEADER`.
            deltas: float32, on the wire's grid.
            counts: `[R]` clients of every rank in this round, known to all.
            wire: the format in which deltas travel.
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

    def alive(self) -> None:
        """Note that this rank makes progress, and say so to whoever asks."""
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

    def has_lost_a_rank(self, error: Exception) -> bool:
        """Tell whether an error means that another rank is gone and the others may go on."""
        ...

    def without_the_lost(self) -> "Channel":
        """Return a channel of the ranks that are left, in their order; each of them calls this.

        Raises:
            RankLost: if rank 0, which keeps the records, is among the lost.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """A round's updates as rank 0 sees them. The vectors travel while they are asked for, by every rank, one way."""

    headers: np.ndarray
    """`[K]` of dtype `HEADER`, in client order (complete on every rank)."""
    blocks: Iterator[tuple[slice, np.ndarray]]
    """Pieces of the vector with all clients' deltas `[K, piece]` float32 on rank 0; the memory of one is used again
    for the next but one."""
    sums: Callable[[np.ndarray], Iterator[tuple[slice, np.ndarray]]]
    """Factors `[K]` float64 -> pieces of sum f_k delta_k `[piece]` float64 on rank 0; see `exact_sum`."""


def chunk_columns(clients: int, size: int) -> int:
    """Return how many of P columns travel at a time, so that K rows of them fit into `CHUNK_BYTES`.

    A whole number of int8 chunks, so that a piece is on the grid if its vector is.
    """
    whole = CHUNK_BYTES // (4 * max(1, clients)) // INT8_CHUNK * INT8_CHUNK
    return min(max(whole, INT8_CHUNK), max(size, 1))


def pieces_of(clients: int, size: int) -> list[slice]:
    """Return the pieces in which K deltas of P numbers travel."""
    columns = chunk_columns(clients, size)
    return [slice(at, min(at + columns, size)) for at in range(0, size, columns)]


def open_channel(launch: Launch, *, measure: bool, deadline_s: float = NEVER) -> Channel:
    """Return the channel of this job: over MPI if a launcher started several processes, else local.

    Args:
        launch: what the launcher's environment says.
        measure: see `MPIChannel`.
        deadline_s: see `MPIChannel`.

    Raises:
        SettingsError: if there is no MPI library, or it is another than the launcher's.
    """
    if launch.size == 1:
        from fedprompt_mpi.comm.local_channel import LocalChannel

        return LocalChannel()
    from fedprompt_mpi.comm.mpi_channel import MPIChannel

    return MPIChannel(start_mpi(launch).COMM_WORLD, measure=measure, deadline_s=deadline_s)


def start_mpi(launch: Launch) -> Any:
    """Start MPI and return mpi4py's module.

    Raises:
        SettingsError: if there is no MPI library, or it is another than the launcher's.
    """
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
        set_transport(launch, MPI.Get_library_version())
        MPI.Init_thread()
    if launch.size != MPI.COMM_WORLD.size:
        raise SettingsError(
            f"{launch.launcher} started {launch.size} processes, but MPI sees a world of {MPI.COMM_WORLD.size}: "
            "start with the mpirun of the MPI that mpi4py is bound to"
        )
    return MPI
