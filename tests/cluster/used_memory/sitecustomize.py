"""Leaves holes between random bytes in the C library's memory before MPI is loaded, as long work may do.

With this folder on PYTHONPATH Python imports this at its start. A library that sends more bytes than it means to sends
what lies behind them: zeros in a fresh process, anything in a used one.
"""

import ctypes
import os
import sys


class _BeforeMPI:
    """Asked for each module before the real finders; knows none."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name == "mpi4py.MPI":
            sys.meta_path.remove(self)
            _leave_holes()


def _leave_holes() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    content = os.urandom(3000)
    for size in (64, 200, 400, 520, 1000, 2000, 3000):
        held = [library.malloc(size) for _ in range(2000)]
        for at in held:
            ctypes.memmove(at, content, size)
        for at in held[::2]:
            library.free(at)


sys.meta_path.insert(0, _BeforeMPI())
