"""The cohort of a round: which clients take part, and on which rank each is. All ranks compute it alike.

Legend: K clients, R ranks, W workers.
"""

import dataclasses

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.rules import registry


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cohort:
    """One round's clients and their ranks."""

    clients: tuple[int, ...]
    """Ids, ascending."""
    ranks: tuple[int, ...]
    """The rank of each; ascending, since ranks hold contiguous blocks of clients."""
    size: int
    """R."""
    server: int | None = None
    """The id (the number of clients) under which rank 0 trains on its own data; None if it does not."""
    vanished: tuple[int, ...] = ()
    """Those of the clients whose update will not come: they are gone between their header and their update."""

    @property
    def counts(self) -> np.ndarray:
        """`[R]` int64: updates of each rank in this round, the server's own included."""
        counts = np.bincount(self.ranks, minlength=self.size)
        counts[0] += self.server is not None
        return counts

    @property
    def came(self) -> np.ndarray:
        """Which updates come `[K]` bool, in the order of the headers: the server's own first, then the clients'."""
        server = [] if self.server is None else [self.server]
        return ~np.isin([*server, *self.clients], self.vanished)

    @property
    def came_counts(self) -> np.ndarray:
        """`[R]` int64: updates of each rank that come."""
        server = [] if self.server is None else [0]
        return np.bincount(np.array([*server, *self.ranks], dtype=np.int64)[self.came], minlength=self.size)

    def of_rank(self, rank: int) -> list[int]:
        """Return the clients that train on a rank."""
        return [client for client, home in zip(self.clients, self.ranks, strict=True) if home == rank]

    def trainers(self, rank: int) -> list[int]:
        """Return the ids that train on a rank: its clients, on rank 0 after the server if it trains."""
        server = [self.server] if self.server is not None and rank == 0 else []
        return server + self.of_rank(rank)


def home_ranks(clients: int, size: int) -> np.ndarray:
    """Return the rank of each of K clients `[K]`: contiguous blocks of nearly equal size over the workers.

    With one process that is rank 0; otherwise rank 0 aggregates and ranks 1 to R - 1 are workers.
    """
    workers = max(1, size - 1)
    first = 0 if size == 1 else 1
    blocks = np.array_split(np.arange(clients), workers)
    return np.concatenate([np.full(len(block), first + w) for w, block in enumerate(blocks)]).astype(np.int64)


def draw_cohort(config: RunConfig, size: int, round_: int) -> Cohort:
    """Draw the clients of a round without replacement; under dp_fedavg each independently, so that there may be none.

    Of these, each vanishes independently with the probability `federation.dropout`.

    Args:
        config: number of clients, fraction, drop-out, privacy mechanism and seed.
        size: R.
        round_: round number, from 1.

    References:
        McMahan et al., Learning Differentially Private Recurrent Language Models, 2018, arXiv:1710.06963, Algorithm 1
        (each user independently with probability q).
    """
    clients = config.federation.clients
    rng = seeds.generator(config.seed, "cohort", round_)
    if config.privacy.mechanism == "dp_fedavg":
        chosen = np.flatnonzero(rng.random(clients) < config.federation.fraction)
    else:
        chosen = np.sort(rng.permutation(clients)[: config.federation.cohort_size])
    gone = seeds.generator(config.seed, "vanished", round_).random(clients)[chosen] < config.federation.dropout
    return Cohort(
        clients=tuple(chosen.tolist()),
        vanished=tuple(chosen[gone].tolist()),
        ranks=tuple(home_ranks(clients, size)[chosen].tolist()),
        size=size,
        server=clients if registry.aggregators[config.federation.aggregator].trains_itself else None,
    )
