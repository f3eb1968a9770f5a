"""A pseudo-terminal in which a program runs, and what stands on its screen."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

import pyte


class Terminal:
    """A terminal of some columns that a program has as its standard streams."""

    def __init__(self, columns: int, lines: int = 120) -> None:
        """Make one, large enough that nothing scrolls away."""
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.seen: list[tuple[float, list[str]]] = []
        """Seconds since the start, and the lines that stood there: after every output of the program."""

    def run(self, command: Sequence[str], variables: Mapping[str, str], deadline_s: float) -> int:
        """Run a command to its end, and return its exit status; kill it at the deadline and fail."""
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", self.screen.lines, self.screen.columns, 0, 0))
        began = time.monotonic()
        environment = {**os.environ, "TERM": "xterm", **variables}
        with subprocess.Popen(
            list(command), stdin=its, stdout=its, stderr=its, env=environment, start_new_session=True
        ) as process:
            os.close(its)
            try:
                while time.monotonic() - began < deadline_s:
                    if not select.select([ours], [], [], 0.2)[0]:
                        continue
                    with contextlib.suppress(OSError):  # its other end is closed
                        if data := os.read(ours, 1 << 16):
                            self._stream.feed(data)
                            self.seen.append((time.monotonic() - began, self.lines()))
                            continue
                    return process.wait(timeout=10)
                raise TimeoutError(f"{command} has not ended after {deadline_s} s:\n" + "\n".join(self.lines()))
            finally:
                os.close(ours)
                if process.poll() is None:
                    os.killpg(process.pid, 9)

    def lines(self) -> list[str]:
        """Return the lines that stand on the screen, without empty ones at the end."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip().split("\n")
