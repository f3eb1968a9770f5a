"""What a rank's front hands over to the importer of its node, and what must be the same for both.

A process that is forked by the importer takes over from the front: environment, arguments, folder, open files, umask,
processors and ignored signals. Whatever else makes a difference must be equal, or the rank imports for itself.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

from fedprompt_mpi.start.launcher import Origin

READ_BY_LIBRARIES = (
    "PYTHON", "LD_", "MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "TORCH", "PYTORCH", "HF_",
    "TRANSFORMERS_", "SAFETENSORS_", "TOKENIZERS_", "RAYON_", "XDG_", "LANG", "LC_",
)  # fmt: skip
"""Beginnings of the environment variables that libraries read when they are loaded."""
RELAYED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the front of a rank passes on to it."""
_LIMITS = [name for name in sorted(vars(resource)) if name.startswith("RLIMIT_")]
_PLACES = ("root", "ns/mnt", "ns/pid", "ns/user", "ns/uts", "ns/net")
_LENGTH_BYTES = 8
_MOST_BYTES = 1 << 26
_MOST_FILES = 200


def surroundings() -> dict[str, Any]:
    """Return what must be the same for the importer and for a rank that it forks."""
    return {
        "python": [sys.executable, sys.version, sys.path, list(sys.flags), sys.warnoptions, sorted(sys._xoptions)],
        "user": [os.getresuid(), os.getresgid(), sorted(os.getgroups())],
        "environment": {name: value for name, value in os.environ.items() if name.startswith(READ_BY_LIBRARIES)},
        "limits": [resource.getrlimit(getattr(resource, name)) for name in _LIMITS],
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "places": [_link(f"/proc/self/{place}") for place in _PLACES],
        "cgroup": _text("/proc/self/cgroup"),
        "memory policy": _text("/proc/self/numa_maps").split(maxsplit=2)[1:2],
    }  # fmt: skip


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)  # noqa: PTH115 - quicker than importing pathlib in each front
    return ""


def _text(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as file:  # noqa: PTH123
        return file.read(1 << 16)
    return ""


def send(connection: socket.socket, leash: int) -> None:
    """Hand this process over.

    Args:
        connection: to the importer.
        leash: read end of a pipe whose write end only this process holds.
    """
    mask = os.umask(0)
    os.umask(mask)
    files = _inherited()
    told = {
        "surroundings": surroundings(),
        "environment": dict(os.environ),
        "arguments": sys.argv,
        "folder": os.getcwd(),  # noqa: PTH109
        "umask": mask,
        "processors": sorted(os.sched_getaffinity(0)),
        "ignored": [number for number in RELAYED if signal.getsignal(number) is signal.SIG_IGN],
        "parent": os.getppid(),
        "since": Origin.since,
        "files": files,
    }
    content = json.dumps(told).encode()
    socket.send_fds(connection, [len(content).to_bytes(_LENGTH_BYTES, "little")], [leash, *files])
    connection.sendall(content)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return what a front hands over, and its open files: the leash, then those of `files`.

    Raises:
        OSError: if it has gone.
        ValueError: if it speaks another language.
    """
    head, files, _, _ = socket.recv_fds(connection, _LENGTH_BYTES, _MOST_FILES)
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH_BYTES or length > _MOST_BYTES:
        raise ValueError("no hand-over")
    content = bytearray()
    while len(content) < length:
        part = connection.recv(length - len(content))
        if not part:
            raise ConnectionError("the front has gone")
        content += part
    return json.loads(content), files


def _inherited() -> list[int]:
    """Return the open files that this process got from its launcher."""
    return [
        number
        for number in sorted(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208
        if _is_inherited(number)
    ]


def _is_inherited(number: int) -> bool:
    with contextlib.suppress(OSError):
        return os.get_inheritable(number)
    return False


def take_over(told: dict[str, Any], files: list[int]) -> None:
    """Become the rank that a front has handed over; the process has no other open files than these.

    Args:
        told: from `receive`.
        files: from `receive`.
    """
    import tempfile  # here: a front has no use for it
    import time

    os.setsid()  # a terminal's signals reach the front, which passes them on
    free = max([*told["files"], *files, 2]) + 1
    high = [os.dup2(number, free + i, inheritable=False) for i, number in enumerate(files)]
    for number in files:
        os.close(number)
    for number, wanted in zip(high[1:], told["files"], strict=True):
        os.dup2(number, wanted, inheritable=True)
        os.close(number)
    hang_on(high[0])
    os.environ.clear()
    os.environ.update(told["environment"])
    tempfile.tempdir = None  # both are remembered from the importer's environment
    time.tzset()
    os.chdir(told["folder"])
    os.umask(told["umask"])
    os.sched_setaffinity(0, told["processors"])
    resource.setrlimit(resource.RLIMIT_NOFILE, told["surroundings"]["limits"][_LIMITS.index("RLIMIT_NOFILE")])
    for number in RELAYED:
        signal.signal(number, signal.SIG_IGN if number in told["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in told["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = told["arguments"]
    Origin.parent, Origin.since = told["parent"], told["since"]


def hang_on(leash: int) -> None:
    """Let the kernel kill this process once nobody holds the write end of a pipe: its front has gone.

    Neither a lock of the interpreter nor a library that waits in C can be in the way.
    """
    import fcntl
    import select

    fcntl.fcntl(leash, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(leash, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(leash, fcntl.F_SETFL, fcntl.fcntl(leash, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([leash], [], [], 0)[0]:  # it had gone before
        os._exit(1)
