"""Check words: a linear hash of each update, summed under the same masks, which tells whether a sum is right.

Masks that do not cancel (a lying key, a share of another round), a bit that was flipped and a vector that came twice
all change the sum of the updates. The sum of the hashes is the hash of the sum only if nothing did. A hash is
h = sum_bc rho_b r_c x_bc modulo p, with random rho and r that the round makes public: a wrong sum passes with a
probability of at most (2 / p)^H, about 2^-57, whatever the error is, as long as it does not depend on rho and r.

It is no proof against a client that lies about its update: such a client sends another one.

Legend: P numbers of an update in units, H hashes, p the prime.

References:
    Carter and Wegman, Universal Classes of Hash Functions, 1979.
"""

import numpy as np

PRIME = 2**20 - 3
HASHES = 3
BLOCK = 2**15
"""Products of 16 and 20 bits, of which so many are summed, are exact in float64."""
LIMB_BITS = 10
WORDS = 2 * HASHES
"""Words of the hashes: of each its low bits and its high bits, whose sums over 2^22 clients fit into a word."""


class CheckWords:
    """The hash function of a round, the same for all clients of it."""

    def __init__(self, size: int, seed: bytes) -> None:
        """Draw it from the round's public seed, for P = `size`."""
        rng = np.random.default_rng(list(seed))
        self._columns = rng.integers(1, PRIME, (BLOCK, HASHES)).astype(np.float64)
        self._rows = rng.integers(1, PRIME, (-(-size // BLOCK), HASHES))

    def of(self, units: np.ndarray) -> np.ndarray:
        """Return the words `[WORDS]` uint32 of an update in units `[P]` int32."""
        hashes = self._hashes(units)
        return np.concatenate([hashes & (2**LIMB_BITS - 1), hashes >> LIMB_BITS]).astype(np.uint32)

    def fit(self, total: np.ndarray, words: np.ndarray) -> bool:
        """Return whether a sum of updates `[P]` int32 fits the sum of their words `[WORDS]` uint32."""
        low, high = words[:HASHES].astype(np.int64), words[HASHES:].astype(np.int64)
        return bool(((low + (high << LIMB_BITS)) % PRIME == self._hashes(total)).all())

    def _hashes(self, units: np.ndarray) -> np.ndarray:
        """Return the hashes `[H]` int64, below p."""
        total = np.zeros(HASHES, dtype=np.int64)
        for number, at in enumerate(range(0, len(units), BLOCK)):
            block = units[at : at + BLOCK]
            low, high = (
                (half.astype(np.float64) @ self._columns[: len(block)]) for half in (block & 0xFFFF, block >> 16)
            )
            of_block = (low.astype(np.int64) + (high.astype(np.int64) % PRIME << 16)) % PRIME
            total += of_block * self._rows[number] % PRIME
        return total % PRIME
