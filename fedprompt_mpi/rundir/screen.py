"""What a run shows while it runs: lines, and below them, on a terminal, one line that says what is going on.

Both go to the standard output: a launcher forwards that and the standard error apart, in any order, so that lines and a
bar on two streams would overwrite each other. Where the output is no terminal, what takes long is said by a line.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedprompt_mpi.liveness.exit import wait_until_read
from fedprompt_mpi.liveness.output import printable
from fedprompt_mpi.rundir.formats import WIDTH
from fedprompt_mpi.start.launcher import launcher_pid, read_launch

EVERY_S, DRAW_EVERY_S = 1.0, 0.1
"""How often the time that something takes is shown anew, and progress at most."""
LONG_S = 3.0
"""After so long it is shown."""
UP_AND_CLEAR = "\x1b[1A\x1b[2K"
UP_AND_DOWN = "\x1b[1A\n"
"""Goes nowhere, and ends a line: Open MPI's launcher hands on whole lines alone."""
LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "orterun", "srun")


class Lines:
    """Prints lines alone, for a program that calls this one's functions."""

    has_bar = False

    def say(self, text: str) -> None:
        """Print lines."""
        print(text, flush=True)

    def stage(self, what: str, total: float = 0, *, quiet: bool = False) -> None:
        """Show nothing."""

    def advance(self, done: float, note: str = "") -> None:
        """Show nothing."""


class LiveScreen:
    """Prints lines, and says what is going on. Rank 0 alone has one."""

    def __init__(self) -> None:
        """Find out what the standard output is, and begin."""
        self._stream: Any = getattr(sys.stdout, "steering", sys.stdout)
        self._terminal = terminal_of(1) if _is_standard(sys.stdout) else ""
        self._stage, self._quiet, self._since, self._drawn = "", False, 0.0, 0.0
        self._done, self._total, self._note = 0.0, 0.0, ""
        self._shows = False
        self._lock, self._over = threading.Lock(), threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()
        self.stage("starting MPI")

    def __enter__(self) -> "LiveScreen":
        """Let what goes to the standard error stand above the line at the bottom."""
        self._error = sys.stderr
        if self._terminal:
            sys.stderr = _Above(self, sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        sys.stderr = self._error
        self.close()

    def step_aside(self) -> None:
        """Remove the line at the bottom until the next one is drawn."""
        with self._lock:
            if self._shows:
                self._stream.write(UP_AND_CLEAR + UP_AND_DOWN)
                self._stream.flush()
                wait_until_read(1)  # the launcher hands the standard error on by another way
                self._shows = False

    @property
    def has_bar(self) -> bool:
        """True if the output is a terminal, and progress is shown there."""
        return bool(self._terminal)

    def say(self, text: str) -> None:
        """Print lines."""
        with self._lock:
            self._write(f"{text}\n")

    def stage(self, what: str, total: float = 0, *, quiet: bool = False) -> None:
        """Say what begins now.

        Args:
            what: such as "loading the model".
            total: how much of it there is, for a bar; 0 if that is not known.
            quiet: only for the line on a terminal: plain output has lines of its own for it.
        """
        with self._lock:
            self._stage, self._quiet, self._since = what, quiet, time.monotonic()
            self._done, self._total, self._note = 0.0, total, ""
            self._write("")

    def advance(self, done: float, note: str = "") -> None:
        """Say how much of it is done."""
        with self._lock:
            self._done, self._note = done, note or self._note
            if time.monotonic() - self._drawn >= DRAW_EVERY_S:
                self._write("")

    def close(self) -> None:
        """Remove the line at the bottom."""
        self._over.set()
        with self._lock:
            self._stage, shown = "", self._shows
            self._write("")
        if shown:
            wait_until_read(1)  # what comes on the standard error comes after

    def _tick(self) -> None:
        while not self._over.wait(EVERY_S):
            with self._lock:
                if self._terminal:
                    self._write("")
                elif not self._quiet and self._stage and time.monotonic() - self._since >= EVERY_S:
                    self._quiet = True
                    self._write(f"{self._stage} ...\n")

    def _write(self, text: str) -> None:
        """Write lines, and what is going on below them, in one piece.

        That line ends too, as `UP_AND_DOWN` says why. The next piece goes up to it and takes it away.
        """
        line = f"{self._line()}\n" if self._terminal and self._stage else ""
        if text or line or self._shows:
            gone = UP_AND_CLEAR if self._shows else ""
            self._stream.write(gone + (printable(text + line) or UP_AND_DOWN))
            self._stream.flush()
        self._shows, self._drawn = bool(line), time.monotonic()

    def _line(self) -> str:
        from tqdm import tqdm

        seconds, columns = time.monotonic() - self._since, _columns(self._terminal) - 1
        note = self._note or (f"{seconds:.0f} s" if seconds >= LONG_S else "")
        if not self._total:
            return f"{self._stage}  {note}"[:columns]
        left, right = (text.replace("{", "{{").replace("}", "}}") for text in (self._stage, note))
        share, shape = min(1.0, self._done / self._total), f"{left}  [{{bar}}]  {right}"
        return tqdm.format_meter(share, 1, seconds, ncols=columns, bar_format=shape)[:columns]


class _Above:
    """The standard error while a line stands at the bottom of the terminal."""

    def __init__(self, screen: LiveScreen, stream: Any) -> None:
        self._screen, self._stream = screen, stream

    def write(self, text: str) -> int:
        """Write a text, once that line is gone."""
        self._screen.step_aside()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_standard(stream: Any) -> bool:
    """Return True if a stream is the process's own standard output, and not what a program has put in its place."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return stream.fileno() == 1
    return False


def terminal_of(number: int) -> str:
    """Return the terminal that a standard stream of this process shows on; empty if on none.

    A launcher gives its ranks pipes, or terminals of its own: then it is that of the launcher's own stream.
    """
    if read_launch().launcher == "none":
        with contextlib.suppress(OSError):  # a container may not know the name of its terminal
            return os.ttyname(number) if os.isatty(number) else ""
    for process in _launchers():
        with contextlib.suppress(OSError):
            shown_on = str(Path(f"/proc/{process}/fd/{number}").readlink())
            return shown_on if shown_on.startswith(("/dev/pts/", "/dev/tty")) else ""
    return ""


def _launchers() -> Iterator[int]:
    """Yield the processes above this one that are launchers, the first one first."""
    process = launcher_pid()
    for _ in range(8):
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return
        if stat[stat.index("(") + 1 : stat.rindex(")")] in LAUNCHERS:
            yield process
        process = int(stat[stat.rindex(")") + 2 :].split()[1])


def _columns(terminal: str) -> int:
    """Return how many columns a terminal has now; its user may change that."""
    with contextlib.suppress(OSError):
        opened = os.open(terminal, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            return os.get_terminal_size(opened).columns or WIDTH
        finally:
            os.close(opened)
    return WIDTH
