"""Masks: keys stretched by a stream cipher into 32-bit words, added modulo 2^32.

Legend: P words of a vector, n keys.
"""

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR

BLOCK = 2**15
"""Words at a time: all masks are added to them while they are in the cache."""
WORD = np.dtype("<u4")


class Masks:
    """The streams of n keys, each added or subtracted. Each key is for one stream: the counter begins at zero.

    References:
        NIST SP 800-38A, Section 6.5 (counter mode), of AES with 256 bits.
    """

    def __init__(self, keys: Iterable[tuple[bytes, int]]) -> None:
        """Begin the streams of keys, each with +1 to add it or -1 to subtract it."""
        self._streams = [(Cipher(AES(key), CTR(bytes(16))).encryptor(), sign) for key, sign in keys]
        self._zeros, self._stream = bytes(4 * BLOCK), bytearray(4 * BLOCK)

    def add_to(self, words: np.ndarray) -> None:
        """Add the next words of all streams to `words` `[P]` uint32, in place and modulo 2^32."""
        stream = np.frombuffer(self._stream, dtype=WORD)
        zeros = memoryview(self._zeros)
        for at in range(0, len(words), BLOCK):
            block = words[at : at + BLOCK]
            for cipher, sign in self._streams:
                cipher.update_into(zeros[: 4 * len(block)], self._stream)
                (np.add if sign > 0 else np.subtract)(block, stream[: len(block)], out=block)
