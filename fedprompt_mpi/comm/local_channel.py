"""One process that is server and worker at once: nothing travels, and the bits are those of a job of many ranks."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fedprompt_mpi.comm.channel import Chunks
from fedprompt_mpi.comm.chunks import chunks_of
from fedprompt_mpi.comm.codec import FLOAT32, Codec
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.comm.placement import MOST_PROCESSORS, MPILibrary, Placement, host_name, share_of_cores
from fedprompt_mpi.comm.progress import Progress
from fedprompt_mpi.comm.temporary import explained, make_folder, remove_folder
from fedprompt_mpi.comm.timing import Phases, Timing
from fedprompt_mpi.liveness.liveness import Liveness

NO_MPI = MPILibrary(
    library="none (one process)",
    transport="none",
    thread_level="none",
    survives=False,
    clock_resolution_s=time.get_clock_info("perf_counter").resolution,
)


class LocalChannel:
    """A job of one process. The methods are those of `Channel`."""

    rank, size = 0, 1

    def __init__(self, liveness: Liveness | None = None) -> None:
        """Start with empty records."""
        self.placement = Placement(
            rank=0,
            host=host_name(),
            local_rank=0,
            cores=share_of_cores(np.ones(MOST_PROCESSORS)),
            nodes=np.zeros(1, dtype=np.int64),
            original_ranks=np.zeros(1, dtype=np.int64),
            mpi=NO_MPI,
        )
        self.phases = Phases(Timing(), liveness or Liveness())
        self.progress = Progress()

    def tell(self, values: np.ndarray, root: int = 0) -> None:
        """Do nothing: there is no other rank."""

    def broadcast(self, vector: Vector, codec: Codec = FLOAT32) -> None:
        """Do nothing: there is no other rank."""

    def consult(
        self, rows: np.ndarray, counts: np.ndarray, answer: Callable[[np.ndarray], Any], told: np.ndarray
    ) -> np.ndarray:
        """Answer, and return the rows."""
        told[:] = answer(rows)
        return rows

    def gather(self, rows: Vector, counts: np.ndarray, codec: Codec = FLOAT32, phase: str = "gather") -> Chunks:
        """Yield the rows in the chunks in which they would travel."""
        return ((chunk, np.asarray(rows[:, chunk])) for chunk in chunks_of(len(rows), rows.shape[1]))

    def scatter(self, rows: np.ndarray, counts: np.ndarray, size: int) -> Chunks:
        """Yield the rows in the chunks in which they would travel."""
        return ((chunk, rows[:, chunk]) for chunk in chunks_of(len(rows), size))

    def reduce(self, words: Callable[[slice], np.ndarray], size: int) -> Chunks:
        """Yield the words in the chunks in which their sum would travel."""
        for chunk in chunks_of(1, size):
            with self.phases.time("pack"):
                mine = words(chunk)
            yield chunk, mine

    def connect(self, ranks: np.ndarray) -> None:
        """Do nothing: there is no other rank."""

    def share(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the rows."""
        return rows

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the values."""
        return values

    def agree(self, error: str | None) -> str | None:
        """Return the error."""
        return error

    def collect(self, data: bytes, phase: str | None = None) -> list[bytes]:
        """Return the data."""
        return [data]

    def deal(self, parts: list[bytes], phase: str) -> bytes:
        """Return the only part."""
        return parts[0]

    @contextlib.contextmanager
    def node_folder(self) -> Iterator[Path]:
        """Make a temporary folder, and remove it."""
        folder, lock = make_folder()
        try:
            with explained(folder):
                yield folder
        finally:
            remove_folder(folder, lock)

    def recover(self, error: Exception) -> bool:
        """Return False: there is no other rank to lose."""
        return False

    def close(self, *, alone: bool = False) -> None:
        """Do nothing."""
