"""One process that is server and worker at once: nothing travels, and the bits are those of a job of many ranks."""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fedprompt_mpi.comm.channel import Gathered, pieces_of
from fedprompt_mpi.comm.exact_sum import in_units, unit_of
from fedprompt_mpi.comm.last_seen import HERE
from fedprompt_mpi.comm.stop import is_requested
from fedprompt_mpi.comm.timing import Timing
from fedprompt_mpi.comm.topology import MOST_PROCESSORS, read_place
from fedprompt_mpi.comm.wire import FLOAT32, Wire


class LocalChannel:
    """A job of one process."""

    rank, size = 0, 1
    library, transport = "none (one process)", "none"
    thread_level, survives = "none", False
    clock_resolution_s = time.get_clock_info("perf_counter").resolution

    def __init__(self) -> None:
        """Start with empty records."""
        self.place = read_place(0, 0, np.ones(MOST_PROCESSORS), server_here=True)
        self.nodes = np.zeros(1, dtype=np.int64)
        self.first_ranks = np.zeros(1, dtype=np.int64)
        self.timing = Timing()
        self.synchronise: Callable[[], None] = lambda: None
        self.stopping = False
        self._folder: Path | None = None
        self._show: Callable[[int], None] | None = None
        self._steps = 0

    def broadcast(self, vector: np.ndarray, fingerprint: int, wire: Wire = FLOAT32) -> None:
        """Take note of a request to stop; there is nobody to send to."""
        self.stopping = is_requested()

    def gather(self, headers: np.ndarray, deltas: np.ndarray, counts: np.ndarray, wire: Wire = FLOAT32) -> Gathered:
        """Return this process's own updates, piece by piece as over MPI."""
        pieces = pieces_of(len(headers), deltas.shape[1])

        def sums(factors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
            unit = unit_of(factors, headers["largest"])
            for piece in pieces:
                yield piece, unit * in_units(np.asarray(deltas[:, piece]), factors, unit)

        blocks = ((piece, np.asarray(deltas[:, piece])) for piece in pieces)
        return Gathered(headers=headers, blocks=blocks, sums=sums)

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

    def alive(self) -> None:
        """Note that there is progress."""
        HERE.alive()

    def report_progress(self, left: int) -> None:
        """Show the progress at once."""
        self.alive()
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

    def has_lost_a_rank(self, error: Exception) -> bool:
        """There is no other rank."""
        return False

    def without_the_lost(self) -> "LocalChannel":
        """Return itself."""
        return self

    def close(self) -> None:
        """Remove the temporary folder."""
        self.drop_shared_folder()
