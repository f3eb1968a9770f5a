"""The time during which this process ran.

A job may be stopped as a whole: by SIGSTOP, by a batch system that suspends it, by a laptop's lid. When it wakes, no
deadline has passed because of that.
"""

import threading
import time

LONGEST_GAP_S = 5.0
"""In a longer time between two looks at the clock the process did not run: the watchdog looks every second."""


class RunningClock:
    """Seconds since its start, without those in which nobody looked at it for long. Any thread may look."""

    def __init__(self) -> None:
        """Start at 0."""
        self._lock, self._looked, self._ran_s = threading.Lock(), time.monotonic(), 0.0

    def __call__(self) -> float:
        """Return the seconds for which the process has run."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked <= LONGEST_GAP_S:
                self._ran_s += now - self._looked
            self._looked = now
            return self._ran_s
