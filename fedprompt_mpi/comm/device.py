"""Vectors that MPI sends: NumPy arrays, or with `comm.gpu_aware` tensors in the memory of a GPU.

This is the only place that handles both; elsewhere a `Vector` is only passed on.
"""

import sys
from typing import Any

import numpy as np

Vector = Any
"""A NumPy array or a torch tensor, float32. Tensors appear only with `comm.gpu_aware`."""


def is_on_host(vector: Vector) -> bool:
    """Return True for a NumPy array."""
    return isinstance(vector, np.ndarray)


def contiguous(block: Vector) -> Vector:
    """Return a block of an array or tensor in contiguous memory."""
    return np.ascontiguousarray(block) if is_on_host(block) else block.contiguous()


def synchronise(vector: Vector) -> None:
    """Wait until the GPU has finished all work on a tensor, before MPI reads it or a clock is read."""
    if getattr(vector, "is_cuda", False):
        sys.modules["torch"].cuda.synchronize(vector.device)
