"""Malicious clients: which clients attack their update, and what an attacker observes of the global vector."""

import numpy as np

from fedprompt_mpi.config import PoisonConfig, RunConfig
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.attack_base import Attack


def attacking_clients(config: RunConfig) -> set[int]:
    """Return the clients that send another update than the one they trained."""
    return set(config.malicious) if config.poison.attacks_update else set()


def make_attacks(config: RunConfig, cohort: Cohort, rank: int, last_update: np.ndarray | None) -> dict[int, Attack]:
    """Return the attack of each of a rank's clients that attack their update in this round.

    Args:
        config: who attacks, and how.
        cohort: the clients of the round.
        rank: of this process.
        last_update: `[P]` float32, from `Observer.last_update`.
    """
    attacking = attacking_clients(config)
    attackers = [client for client in cohort.of_rank(rank) if client in attacking]
    if not attackers:
        return {}
    attack: Attack = registry.attacks[config.poison.attack](config.poison, last_update)
    return dict.fromkeys(attackers, attack)


class Observer:
    """An attacker that observes the broadcasts knows how the global vector moves; inactive if no attack needs it."""

    def __init__(self, config: PoisonConfig) -> None:
        """Start without a vector."""
        self.watches = config.has_clients and registry.attacks[config.attack].needs_last_update
        self._previous: np.ndarray | None = None

    def note(self, vector: np.ndarray) -> None:
        """Remember the vector `[P]` from which a round starts."""
        if self.watches:
            self._previous = vector.copy()

    def last_update(self, vector: np.ndarray) -> np.ndarray | None:
        """Return `vector` minus the remembered one `[P]` float32; None if there is none."""
        return None if self._previous is None else vector - self._previous

    def state(self) -> dict[str, np.ndarray]:
        """Return the remembered vector, for the checkpoint."""
        return {} if self._previous is None else {"vector_before": self._previous}
