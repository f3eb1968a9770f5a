"""Masks: keys stretched by a stream cipher into words, added modulo 2^32 or 2^64.

Legend: P words of a vector, n keys.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

BLOCK_BYTES = 2**17
"""At a time: all masks are added to them while they are in the cache."""


class Masks:
    """The streams of n keys, each added or subtracted. Each key is for one stream: the counter begins at zero.

    References:
        NIST SP 800-38A, Section 6.5 (counter mode), of AES with 256 bits.
    """

    def __init__(self, keys: Iterable[tuple[bytes, int]]) -> None:
        """Begin the streams of keys, each with +1 to add it or -1 to subtract it."""
        self._streams = [(Cipher(AES(key), CTR(bytes(16))).encryptor(), sign) for key, sign in keys]
        self._zeros, self._stream = memoryview(bytes(BLOCK_BYTES)), bytearray(BLOCK_BYTES)

    def add_to(self, words: np.ndarray) -> None:
        """Add the next words of all streams to `words` `[P]` uint32 or uint64, in place, modulo 2^32 or 2^64."""
        stream, size = np.frombuffer(self._stream, dtype=words.dtype), BLOCK_BYTES // words.itemsize
        for at in range(0, len(words), size):
            block = words[at : at + size]
            for cipher, sign in self._streams:
                cipher.update_into(self._zeros[: block.nbytes], self._stream)
                (np.add if sign > 0 else np.subtract)(block, stream[: len(block)], out=block)
