"""What rules that compare updates have in common: the inner products of all pairs.

They observe every chunk and sum the products. Distances, angles and norms follow from them, as do the distances of any
weighted mean: no further pass over the vectors is needed. Rules that go by distance are in distance.py, by angle in
angle.py.

Legend: K clients of the round, P parameters.
"""

import collections
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import threadpoolctl

from fedprompt_mpi.rules.aggregator_base import TINY, Aggregator, Updates

ROWS, COLUMNS = 200, 2048
"""Clients whose inner products or distances are computed at a time, and the numbers of each: they stay in the cache."""


class PairwiseRule(Aggregator):
    """Base of the rules that compare updates: it sums the inner products of all pairs over the chunks."""

    observes_first = True

    def begin(self, updates: Updates) -> None:
        """Reset the inner products."""
        self._inner, self._is_whole = np.zeros((len(updates.clients), len(updates.clients))), True

    def observe(self, chunk: slice, deltas: np.ndarray, vector: np.ndarray) -> None:
        """Add the inner products of this chunk."""
        self._add(deltas)

    def _add(self, rows: np.ndarray) -> None:
        add_inner_products(self._inner, rows)
        self._is_whole = False

    @property
    def inner(self) -> np.ndarray:
        """`[K, K]` float64, the inner products of all pairs."""
        if not self._is_whole:
            for at in range(0, len(self._inner), ROWS):
                self._inner[:at, at : at + ROWS] = self._inner[at : at + ROWS, :at].T
            self._is_whole = True
        return self._inner

    @property
    def cosines(self) -> np.ndarray:
        """`[K, K]` float64 in [-1, 1]; that of a zero delta with any other is 0."""
        return cosines_of(self.inner)


def cosines_of(inner: np.ndarray) -> np.ndarray:
    """Return the cosines of all pairs `[K, K]`, from their inner products; that of a zero delta with any other is 0."""
    norms = np.maximum(np.sqrt(inner.diagonal()), TINY)
    return np.clip(inner / norms[:, None] / norms, -1.0, 1.0)


def add_inner_products(total: np.ndarray, rows: np.ndarray) -> None:
    """Add the inner products of all pairs of rows `[K, chunk]` float32 to `total` `[K, K]` float64, in place.

    Only the lower half is complete, since the products of a block of rows with a block above it are left out.

    BLAS computes each block in one thread, since the order in which it sums depends on the number of its threads; the
    blocks are spread over the cores of this process.
    """
    step = min(max(len(rows) // 4, ROWS), 1024)  # larger blocks need fewer passes, smaller ones are spread more evenly
    blocks = [slice(at, at + step) for at in range(0, len(rows), step)]
    pairs = [(first, second) for at, first in enumerate(blocks) for second in blocks[: at + 1]]
    buffer = np.empty((len(rows), min(COLUMNS, rows.shape[1])))
    with one_thread():
        for at in range(0, rows.shape[1], COLUMNS):
            part = rows[:, at : at + COLUMNS]
            wide = buffer[:, : part.shape[1]]
            wide[:] = part

            def add(pair: tuple[slice, slice], wide: np.ndarray = wide) -> None:
                first, second = pair
                total[first, second] += wide[first] @ wide[second].T

            in_parallel(add, pairs)


def exact_product(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return a matrix `[n, K]` times rows `[K, chunk]`, `[n, chunk]` float64, with the same bits on any machine load.

    BLAS computes it in one thread; see `add_inner_products`.
    """
    with one_thread():
        return matrix @ rows.astype(np.float64)


def one_thread() -> AbstractContextManager[Any]:
    """Return a context in which BLAS and LAPACK use one thread, and give the same bits on any machine load."""
    return _blas().limit(limits=1, user_api="blas")


def in_parallel(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `work` for each item, on all cores of this process."""
    with ThreadPoolExecutor(_cores()) as pool:
        collections.deque(pool.map(work, items), maxlen=0)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _blas() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def squared_distances(inner: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
    """Return the squared distances of some of K vectors to all `[rows, K]` float64, from their inner products."""
    squares = inner.diagonal()
    return np.maximum(squares[rows, None] + squares - 2 * inner[rows], 0.0)
