"""The watchdog: a thread that ends the job if its process makes no progress for too long.

It cannot judge a rank that waits for others, nor one that is stopped or stuck where no Python runs: `stalled` does.
"""

import ctypes
import sys
import threading
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedprompt_mpi.liveness.liveness import Liveness


class StalledError(RuntimeError):
    """A rank makes no progress, or ranks wait for each other for ever."""


class Watchdog(threading.Thread):
    """Watches over one thread of this process."""

    def __init__(self, liveness: "Liveness", thread: int) -> None:
        """Prepare to watch over the thread with this identifier."""
        super().__init__(name="watchdog", daemon=True)
        self._liveness, self._thread, self._over = liveness, thread, threading.Event()

    def run(self) -> None:
        """Look at the progress a few times in each deadline."""
        live = self._liveness
        while not self._over.wait(min(live.deadline_s / 10, 1.0)):
            ran_s = live.clock()  # before the progress is read, which another thread may make meanwhile
            allowed_s = live.deadline_s if live.patience_s is None else live.patience_s
            if live.collective is None and ran_s - live.ran_since > allowed_s:
                setting = " (comm.deadline_s)" if allowed_s >= live.deadline_s else ""
                self._bark(f"has made no progress for {min(allowed_s, live.deadline_s):g} s{setting}")
                return

    def _bark(self, what: str) -> None:
        stack = sys._current_frames().get(self._thread)
        details = "".join(traceback.format_stack(stack)) if stack else ""
        if self._liveness.ends_job:
            self._liveness.fail(what, details)
        where = f"in phase {self._liveness.phase} of round {self._liveness.round}"
        raise_in(self._thread, f"rank {self._liveness.rank} {what} {where}")

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()


def raise_in(thread: int, message: str) -> None:
    """Raise a `StalledError` in another thread, as soon as it runs Python code again."""

    class RaisedError(StalledError):
        def __init__(self) -> None:
            super().__init__(message)

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(RaisedError))
