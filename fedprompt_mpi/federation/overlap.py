"""Rank 0 aggregates one chunk of the vectors while the next one arrives."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def overlapped(
    chunks: Iterable[tuple[slice, Any]], work: Callable[[slice, Any], None], on_wait: Callable[[], None] = lambda: None
) -> None:
    """Call `work` on every chunk, in order, in a second thread, while this thread fetches the next chunk.

    NumPy and MPI both release the GIL, so that the threads run in parallel. At most two chunks exist at a time. An
    exception of `work` is raised here.

    Args:
        chunks: columns and numbers.
        work: called in the second thread.
        on_wait: called in this thread before it waits for `work`.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="overlapped") as thread:
        under_way: Future[None] | None = None
        for chunk, numbers in chunks:
            _wait_for(under_way, on_wait)
            under_way = thread.submit(work, chunk, numbers)
        _wait_for(under_way, on_wait)


def _wait_for(under_way: "Future[None] | None", on_wait: Callable[[], None]) -> None:
    if under_way is not None:
        on_wait()
        under_way.result()
