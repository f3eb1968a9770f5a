"""Check words: a linear hash of each update, summed under the same masks, which tells whether a sum is right.

Masks that do not cancel (a lying key, a share of another round), a bit that was flipped and a vector that came twice
all change the sum of the updates. The sum of the hashes is the hash of the sum only if nothing did. A hash is
h = sum_bc rho_b r_c x_bc modulo 2^64, with random 64-bit rho and r that the round makes public. It is additive where it
is masked, so the sum of the hashes says no more than the sum of the updates. An error below 2^32 passes one hash with a
probability of at most 2^-28, whatever it is, as long as it does not depend on rho and r; and both with 2^-56.

It is no proof against a client that lies about its update: such a client sends another one.

Legend: P numbers of an update in units, H hashes.

References:
    Carter and Wegman, Universal Classes of Hash Functions, 1979.
"""

import numpy as np

HASHES = 2
BLOCK = 2**14


class CheckWords:
    """The hash function of a round, the same for all clients of it."""

    def __init__(self, size: int, seed: bytes) -> None:
        """Draw it from the round's public seed, for P = `size`."""
        rng = np.random.default_rng(list(seed))
        self._columns = rng.integers(2**64, size=(HASHES, BLOCK), dtype=np.uint64)
        self._rows = rng.integers(2**64, size=(-(-size // BLOCK), HASHES), dtype=np.uint64)

    def of(self, units: np.ndarray) -> np.ndarray:
        """Return the hashes `[H]` uint64 of an update in units, or of a sum of updates, `[P]` int32."""
        total = np.zeros(HASHES, dtype=np.uint64)
        for number, at in enumerate(range(0, len(units), BLOCK)):
            block = units[at : at + BLOCK].astype(np.int64).view(np.uint64)
            of_block = (self._columns[:, : len(block)] * block).sum(axis=1)
            total += of_block * self._rows[number]
        return total
