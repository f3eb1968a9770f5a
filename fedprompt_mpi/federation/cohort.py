"""Which clients take part in a round, and on which rank each lives: the same on every rank, nothing sent.

Legend: K clients, R ranks, W workers.
"""

import dataclasses

import numpy as np

from fedprompt_mpi import seeds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """One round's clients and where they live."""

    clients: tuple[int, ...]
    """Ids, ascending."""
    ranks: tuple[int, ...]
    """The rank of each; ascending, since clients live in contiguous blocks."""
    size: int
    """R."""

    @property
    def counts(self) -> np.ndarray:
        """`[R]` int64: clients of each rank in this round."""
        return np.bincount(self.ranks, minlength=self.size)

    def of_rank(self, rank: int) -> list[int]:
        """Return the clients that train on a rank."""
        return [client for client, home in zip(self.clients, self.ranks, strict=True) if home == rank]


def home_ranks(clients: int, size: int) -> np.ndarray:
    """Return the rank of each of K clients `[K]`: contiguous blocks over the workers, as even as can be.

    With one process that is rank 0; otherwise rank 0 aggregates and ranks 1 to R - 1 are workers.
    """
    workers = max(1, size - 1)
    first = 0 if size == 1 else 1
    blocks = np.array_split(np.arange(clients), workers)
    return np.concatenate([np.full(len(block), first + w) for w, block in enumerate(blocks)]).astype(np.int64)


def draw_cohort(clients: int, fraction: float, size: int, seed: int, round_: int) -> Cohort:
    """Draw the clients of a round, without replacement.

    Args:
        clients: K.
        fraction: share that takes part, rounded, at least one.
        size: R.
        seed: the run's seed.
        round_: round number, from 1.
    """
    count = max(1, round(fraction * clients))
    chosen = np.sort(seeds.generator(seed, "cohort", round_).permutation(clients)[:count])
    homes = home_ranks(clients, size)[chosen]
    return Cohort(clients=tuple(chosen.tolist()), ranks=tuple(homes.tolist()), size=size)
