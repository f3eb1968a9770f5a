"""Shamir's secret sharing over a prime field: t shares recover a secret, fewer say nothing about it.

A secret of 256 bits is shared together with 128 bits of its hash, for which the field of 521 bits has room: shares that
do not belong together are noticed, not used.

References:
    Shamir, How to Share a Secret, Communications of the ACM, 1979.
"""

import hashlib
import secrets
from collections.abc import Collection, Mapping

PRIME = 2**521 - 1
"""A Mersenne prime, far above 2^384."""
SECRET_BYTES, HASH_BYTES, SHARE_BYTES = 32, 16, 66


class WrongSharesError(Exception):
    """Shares are too few, or do not belong together."""


def split(secret: bytes, threshold: int, holders: Collection[int]) -> dict[int, bytes]:
    """Return the share of each holder, of `SHARE_BYTES`.

    Args:
        secret: of `SECRET_BYTES`.
        threshold: t, from 1 to the number of holders.
        holders: their numbers, from 0; the share of holder x is the polynomial's value at x + 1.
    """
    polynomial = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    polynomial.append(int.from_bytes(secret + _hash(secret), "big"))  # the value at 0
    return {holder: _value(polynomial, holder + 1).to_bytes(SHARE_BYTES, "big") for holder in holders}


def _value(polynomial: list[int], at: int) -> int:
    """Return a polynomial's value, its highest coefficient first."""
    value = 0
    for coefficient in polynomial:
        value = (value * at + coefficient) % PRIME
    return value


def recover(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret that the holders' shares are of.

    Raises:
        WrongSharesError: if there are fewer than `threshold`, or they do not belong together.
    """
    if len(shares) < threshold:
        raise WrongSharesError(f"{len(shares)} shares are there, and {threshold} are needed")
    chosen = sorted(shares)[:threshold]
    value = 0
    for holder in chosen:
        above, below = int.from_bytes(shares[holder], "big"), 1
        for other in chosen:
            if other != holder:
                above = above * (other + 1) % PRIME
                below = below * (other - holder) % PRIME
        value += above * pow(below, -1, PRIME)
    found = (value % PRIME).to_bytes(SHARE_BYTES, "big")
    secret = found[-SECRET_BYTES - HASH_BYTES : -HASH_BYTES]
    if found != (secret + _hash(secret)).rjust(SHARE_BYTES, b"\0"):
        raise WrongSharesError("shares do not belong together")
    return secret


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()[:HASH_BYTES]
