"""The channel: transport between the ranks of a job, and nothing about what the vectors mean.

`MPIChannel` connects the ranks of a job, `LocalChannel` does the same in one process, to the bit. Every rank calls the
same methods in the same order. A rank that waits for others sleeps.

Legend: R ranks, K rows of all ranks, k rows of this rank, P length of a vector.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fedprompt_mpi.comm.codec import FLOAT32, Codec
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.comm.placement import Placement
from fedprompt_mpi.comm.progress import Progress
from fedprompt_mpi.comm.timing import Phases

Chunks = Iterator[tuple[slice, np.ndarray]]
"""Chunks of vectors: the columns, and the numbers in them. A chunk's memory is reused for the next but one."""


class RankLost(Exception):  # noqa: N818 - what happened to another rank
    """A rank was lost and the others cannot continue without it; raised on every rank that notices."""


class Channel(Protocol):
    """The ranks of a job."""

    rank: int
    size: int
    placement: Placement
    phases: Phases
    progress: Progress

    def tell(self, values: np.ndarray, root: int = 0) -> None:
        """Copy a small array of one rank into everybody's, in place."""
        ...

    def broadcast(self, vector: Vector, codec: Codec = FLOAT32) -> None:
        """Copy rank 0's `vector` `[P]` float32, which the codec represents exactly, into everybody's, in place."""
        ...

    def consult(
        self, rows: np.ndarray, counts: np.ndarray, answer: Callable[[np.ndarray], Any], told: np.ndarray
    ) -> np.ndarray:
        """Gather small rows at rank 0, and tell every rank what it answers: then all of them have arrived.

        Args:
            rows: `[k]` of any dtype.
            counts: `[R]` int64, rows of every rank.
            answer: rows of all ranks `[K]`, in rank order -> what `told` shall hold; called on rank 0.
            told: receives the answer, in place.

        Returns:
            The rows of all ranks on rank 0, this rank's own elsewhere.
        """
        ...

    def gather(self, rows: Vector, counts: np.ndarray, codec: Codec = FLOAT32, phase: str = "gather") -> Chunks:
        """Yield chunks of all ranks' vectors, `[K, chunk]` on rank 0, in rank order.

        The vectors travel while the chunks are asked for, which every rank must do to the end.

        Args:
            rows: `[k, P]` float32, which the codec represents exactly; or uint32, which it leaves as they are.
            counts: `[R]` int64, rows of every rank.
            codec: how they travel.
            phase: under which they are timed.
        """
        ...

    def scatter(self, rows: np.ndarray, counts: np.ndarray, size: int) -> Chunks:
        """Yield chunks of this rank's rows `[k, chunk]` float32 of those that rank 0 has: what `gather` undoes.

        Args:
            rows: `[K, P]` float32 on rank 0, in rank order.
            counts: `[R]` int64, rows of every rank.
            size: P.
        """
        ...

    def reduce(self, words: Callable[[slice], np.ndarray], size: int) -> Chunks:
        """Yield chunks of the sum of all ranks' words modulo 2^32, `[chunk]` uint32 on rank 0, empty elsewhere.

        Args:
            words: columns -> this rank's words in them, `[chunk]` uint32; called when they are about to travel.
            size: P.
        """
        ...

    def connect(self, ranks: np.ndarray) -> None:
        """Give some ranks, `[n]` int64, a communicator of their own, for `share`; every rank calls this."""
        ...

    def share(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the rows of all connected ranks `[K, P]`, in rank order, on each of these; its own elsewhere.

        Every rank calls this, but only connected ones wait for each other. It is not timed.

        Args:
            rows: `[k, P]` float32.
            counts: `[R]` int64, rows of every rank; 0 for ranks that are not connected.
        """
        ...

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of float64 arrays of equal shape over the ranks, on every rank."""
        ...

    def agree(self, error: str | None) -> str | None:
        """Return the lowest rank's error message on every rank, or None if no rank has one."""
        ...

    def collect(self, data: bytes, phase: str | None = None) -> list[bytes]:
        """Return the data of every rank on rank 0, [] elsewhere; timed under a phase, if one is given."""
        ...

    def deal(self, parts: list[bytes], phase: str) -> bytes:
        """Return this rank's part of what rank 0 has for every rank; timed under a phase.

        Args:
            parts: of R ranks on rank 0, [] elsewhere.
            phase: under which it is timed.
        """
        ...

    def node_folder(self) -> AbstractContextManager[Path]:
        """Share a temporary folder among the ranks of a node during the block.

        It is removed once all ranks of the node have left the block; files that they have mapped stay mapped.
        """
        ...

    def recover(self, error: Exception) -> bool:
        """Continue with the remaining ranks if an error means that a rank was lost; return False if it does not.

        Rank, size and placement are those of the remaining ranks afterwards.

        Raises:
            RankLost: if rank 0 was lost, which keeps the records.
        """
        ...

    def close(self, *, alone: bool = False) -> None:
        """Leave the channel, together with all other ranks, or alone after a failure."""
        ...
