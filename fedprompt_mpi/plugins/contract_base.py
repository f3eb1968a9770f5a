"""What the checks of the contract share."""

from typing import Any

import numpy as np

from fedprompt_mpi.config import RunConfig, from_dict


class BrokenError(Exception):
    """Something that is registered does not keep what it must; the message has the numbers."""


def settings(section: str, **given: Any) -> RunConfig:
    """Return the defaults with some settings of a section."""
    return from_dict({section: given})


def expect(holds: Any, found: str) -> str:
    """Return what was found, if it holds; else raise BrokenError."""
    if not holds:
        raise BrokenError(found)
    return found


def expect_same(one: np.ndarray, other: np.ndarray, what: str, tolerance: float = 0.0) -> str:
    """Return the largest difference of two arrays, in shares of the largest number; raise BrokenError if it is more."""
    expect(one.shape == other.shape, f"{what}: shape {one.shape}, expected {other.shape}")
    scale = float(np.abs(other).max(initial=0.0)) or 1.0
    difference = float(np.abs(one.astype(np.float64) - other).max(initial=0.0)) / scale
    return expect(difference <= tolerance, f"{what}: largest difference {difference:.1e}, allowed {tolerance:.0e}")
