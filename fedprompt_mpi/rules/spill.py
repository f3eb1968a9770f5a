"""Buffers for vectors that may exceed memory: beyond a limit they live in an unnamed temporary file.

The file is in TMPDIR, which should be on a disk: in a file system in memory (tmpfs) nothing would be saved.

Legend: K clients, P parameters.
"""

import tempfile
from collections.abc import Iterator
from typing import IO

import numpy as np

MOST_BYTES_IN_MEMORY = 2**30
"""Larger buffers are mapped from a file, which the system may write out of memory."""
MOST_KEPT_BYTES = 2**28
"""Chunks beyond this total are kept in a file and read again."""


def zeros(clients: int, size: int) -> np.ndarray:
    """Return K vectors of zeros `[K, P]` float32."""
    shape = (clients, size)
    if 4 * clients * size <= MOST_BYTES_IN_MEMORY:
        return np.zeros(shape, dtype=np.float32)
    with tempfile.TemporaryFile(prefix="fedprompt-") as file:
        return np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


class SpilledChunks:
    """Chunks of a round's deltas that are needed twice, though each is received once."""

    def __init__(self, clients: int, size: int) -> None:
        """Prepare for chunks of K deltas of P numbers."""
        self._chunks: list[tuple[slice, tuple[int, int], np.ndarray | None]] = []
        self._file: IO[bytes] | None = None
        self._fits = 4 * clients * size <= MOST_KEPT_BYTES

    def keep(self, chunk: slice, deltas: np.ndarray) -> None:
        """Keep one chunk `[K, chunk]` float32."""
        if not self._fits:
            self._file = self._file or tempfile.TemporaryFile(prefix="fedprompt-")  # noqa: SIM115 - closed by close
            self._file.write(np.ascontiguousarray(deltas).data)
        self._chunks.append((chunk, deltas.shape, deltas.copy() if self._fits else None))

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the chunks in the order in which they were kept."""
        if self._file is not None:
            self._file.seek(0)
        for chunk, shape, deltas in self._chunks:
            if self._file is not None:
                deltas = np.empty(shape, dtype=np.float32)
                self._file.readinto(deltas.data.cast("B"))  # pyright: ignore[reportAttributeAccessIssue]
            assert deltas is not None
            yield chunk, deltas

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
