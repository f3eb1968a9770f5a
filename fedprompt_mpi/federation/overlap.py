"""Rank 0 aggregates one chunk of the vectors while the next one arrives."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def overlapped(
    chunks: Iterable[tuple[slice, Any]],
    size: int,
    work: Callable[[slice, Any], None],
    on_wait: Callable[[], None] = lambda: None,
) -> None:
    """Call `work` on every chunk, in order, in a second thread, while this thread fetches the next chunk.

    NumPy and MPI both release the GIL, so that the threads run in parallel. At most two chunks exist at a time. An
    exception of `work` is raised here. The last chunk is worked on in this thread: there is none to fetch meanwhile,
    and a short vector, of one chunk, needs no second thread at all.

    Args:
        chunks: columns and numbers.
        size: of all chunks together.
        work: called in the second thread.
        on_wait: called in this thread before it waits for `work`, or does it.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="overlapped") as thread:
        under_way: Future[None] | None = None
        for chunk, numbers in chunks:
            _wait_for(under_way, on_wait)
            if chunk.stop == size:
                on_wait()
                work(chunk, numbers)
                under_way = None
            else:
                under_way = thread.submit(work, chunk, numbers)
        _wait_for(under_way, on_wait)


def _wait_for(under_way: "Future[None] | None", on_wait: Callable[[], None]) -> None:
    if under_way is not None:
        on_wait()
        under_way.result()
