"""Every random number of a run comes from here, so that it depends on nothing else.

A generator is named by what it is for, not by when it is made: the same (seed, purpose,
round, client) gives the same stream on any rank, in any order, before or after a resume.
"""

import zlib

import numpy as np


def generator(seed: int, purpose: str, round_: int = 0, client: int = 0) -> np.random.Generator:
    """Return the independent random stream of one purpose, round and client.

    Args:
        seed: the run's seed, `>= 0`.
        purpose: a short constant name such as `"batches"`; streams of two names are independent.
        round_: round number, `>= 0`; 0 for what happens before training.
        client: client id, `>= 0`; 0 for what no client owns.

    Returns:
        A NumPy generator (PCG64) seeded through `SeedSequence`.
    """
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), round_, client]))
