"""Output that cannot be written costs no run, and what is printed steers no terminal.

A reader may go away (`| head -1`, a closed terminal), a descriptor may be closed from the start, and a terminal may not
know a character. Names in messages may come from a file of somebody else, and hold control characters.
"""

import contextlib
import os
import re
import sys
from typing import Any

_CONTROL = re.compile(r"[^\t\n -~\u00a0-\U0010ffff]|[\ufeff\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that turn the direction of writing, and halves of surrogate pairs."""


def printable(text: str) -> str:
    """Return a text whose control characters, tab and newline excepted, are written as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """Return a text in one line, without control characters."""
    return printable(text.replace("\n", "\\n").replace("\t", "\\t"))


class Output:
    """A text stream that swallows what cannot be written; everything else is that of the stream below it."""

    def __init__(self, stream: Any, *, steers: bool = False) -> None:
        """Wrap a stream.

        Args:
            stream: a text stream, which has a descriptor.
            steers: True if control characters pass, as progress bars need them.
        """
        self._stream, self._steers = stream, steers
        self.steering: Output = self if steers else Output(stream, steers=True)
        """The same stream for progress bars."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write a text, if that can be; returns its length."""
        with _written(self._stream):
            self._stream.write(text if self._steers else printable(text))
        return len(text)

    def flush(self) -> None:
        """Hand on what has been written, if that can be."""
        with _written(self._stream):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _written(stream: Any) -> Any:
    """Let a stream write to nowhere from now on if it cannot be written to."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: it was closed
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())


def keep_output_safe() -> None:
    """Wrap the standard streams of this process; a closed one writes to nowhere.

    A closed descriptor would be given to the next file that is opened, and get what is printed.
    """
    for number, name, mode in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            handle = os.open(os.devnull, mode)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
        if number == 0 or isinstance(getattr(sys, name), Output):
            continue
        stream = getattr(sys, name) or open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, Output(stream))
