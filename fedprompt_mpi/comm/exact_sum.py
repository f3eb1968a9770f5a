"""Sums in whole numbers, which have the same bits in every order of summation.

A sum of floating-point numbers depends on the order, hence on how clients are spread over ranks and on MPI's reduction
tree. A sum of integers does not: each rank converts its clients' contributions to multiples of a unit that all ranks
know, MPI adds 32-bit integers, and rank 0 converts the total back.

Legend: K clients of the round, P numbers in a vector, f_k the factor of a client, L_k the largest absolute number of
its delta, u the unit.
"""

from collections.abc import Callable

import numpy as np

BLOCK = 2**15
"""Numbers at a time, so that intermediate results stay in the cache."""
HEADROOM_BITS = 30
"""Totals stay below 2^30 units, and rounding adds half a unit a client: 31 bits hold it for 2^31 clients."""


SMALLEST_UNIT = 2.0**-200
"""Far below the smallest float32; factors divided by less could be beyond a float64."""


def unit_of(factors: np.ndarray, largest: np.ndarray) -> float:
    """Return u, a power of two with sum |f_k| L_k <= 2^30 u, or 1 if all is zero.

    Against the exact sum, a total is then off by at most K u / 2, where u <= sum |f_k| L_k / 2^29 or `SMALLEST_UNIT`.

    Args:
        factors: `[K]` float64.
        largest: `[K]` float64.
    """
    taken = factors != 0  # other rows may hold NaN
    most = float(np.abs(factors[taken]) @ largest[taken])
    return max(2.0 ** (int(np.ceil(np.log2(most))) - HEADROOM_BITS), SMALLEST_UNIT) if most > 0 else 1.0


def in_units(deltas: np.ndarray, factors: np.ndarray, unit: float) -> np.ndarray:
    """Return sum f_k delta_k of one rank's clients in units `[P]` int32.

    Args:
        deltas: `[k, P]` float32; a row whose factor is 0 may hold anything.
        factors: `[k]` float64.
        unit: u.
    """
    total = np.zeros(deltas.shape[1], dtype=np.int32)
    scaled = np.empty(min(len(total), BLOCK))
    for factor, delta in zip(factors, deltas, strict=True):
        for at in range(0, len(total) if factor != 0 else 0, BLOCK):
            block = delta[at : at + BLOCK]
            units = scaled[: len(block)]
            np.multiply(block, factor / unit, out=units)
            np.rint(units, out=units)
            np.add(total[at : at + BLOCK], units, out=total[at : at + BLOCK], casting="unsafe")
    return total


def rounding_of(unit: float, size: int) -> float:
    """Return by how much rounding may lengthen a vector of P numbers: half a unit in each."""
    return 0.5 * unit * float(np.sqrt(size))


def words_of(deltas: np.ndarray, factors: np.ndarray, unit: float) -> Callable[[slice], np.ndarray]:
    """Return columns -> what `in_units` returns of them, as words `[chunk]` uint32, for `Channel.reduce`."""
    return lambda chunk: in_units(deltas[:, chunk], factors, unit).view(np.uint32)
