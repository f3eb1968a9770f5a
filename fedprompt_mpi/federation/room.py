"""Room for more vectors than memory should hold: in a temporary file without a name.

It lies in TMPDIR, which should be on a disk: a file system in memory (tmpfs) would save nothing.

Legend: K clients, P parameters.
"""

import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

MOST_BYTES_IN_MEMORY = 2**30
"""K vectors beyond that go to a file, which the system may take out of memory."""
MOST_KEPT_BYTES = 2**28
"""Pieces beyond that are read again from a file."""


def room_for(clients: int, size: int) -> np.ndarray:
    """Return K vectors of zeros `[K, P]` float32."""
    shape = (clients, size)
    if 4 * clients * size <= MOST_BYTES_IN_MEMORY:
        return np.zeros(shape, dtype=np.float32)
    with tempfile.TemporaryFile(prefix="fedprompt-") as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


class KeptPieces:
    """Pieces of a round's deltas that are wanted twice, though each travels once."""

    def __init__(self, clients: int, size: int) -> None:
        """Expect pieces that make up K deltas of P numbers."""
        self._pieces: list[tuple[slice, tuple[int, int], np.ndarray | None]] = []
        self._file: IO[bytes] | None = None
        self._fits = 4 * clients * size <= MOST_KEPT_BYTES

    def keep(self, piece: slice, deltas: np.ndarray) -> None:
        """Keep one piece `[K, piece]` float32."""
        if not self._fits:
            self._file = self._file or tempfile.TemporaryFile(prefix="fedprompt-")  # noqa: SIM115 - closed by close
            self._file.write(np.ascontiguousarray(deltas).data)
        self._pieces.append((piece, deltas.shape, deltas.copy() if self._fits else None))

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Give them back in the order in which they came."""
        if self._file is not None:
            self._file.seek(0)
        for piece, shape, deltas in self._pieces:
            if self._file is not None:
                deltas = np.empty(shape, dtype=np.float32)
                self._file.readinto(deltas.data.cast("B"))  # pyright: ignore[reportAttributeAccessIssue]
            assert deltas is not None
            yield piece, deltas

    def close(self) -> None:
        """Let the file go."""
        if self._file is not None:
            self._file.close()
