"""Rank 0 works on one piece of the vectors while the next is on its way."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def overlapped(pieces: Iterable[tuple[slice, Any]], work: Callable[[slice, Any], None]) -> None:
    """Call `work` on every piece, in order, in a thread of its own; this thread fetches the next one meanwhile.

    NumPy and MPI both let go of the interpreter, so the two really run side by side. At most two pieces are there at a
    time. What `work` raises is raised here.
    """
    with ThreadPoolExecutor(1) as thread:
        under_way: Future[None] | None = None
        for piece, block in pieces:
            if under_way is not None:
                under_way.result()
            under_way = thread.submit(work, piece, block)
        if under_way is not None:
            under_way.result()
