"""What a malicious client does to its update, beside training on poisoned data.

An attack may keep the local training within bounds after each step, and change what is sent after the last.
Whatever it makes is multiplied by `poison.boost` (model replacement). NaN and Inf, and a random direction, are
there to test defences.

Legend: P parameters. A delta is local minus global.

References:
    Bagdasaryan et al., How To Backdoor Federated Learning, 2020, arXiv:1807.00459, Equation 3 (boost).
    Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963 (norm bound).
    Zhang et al., Neurotoxin: Durable Backdoors in Federated Learning, 2022, arXiv:2206.10341, Algorithm 1.
    Blanchard et al., Machine Learning with Adversaries, 2017, arXiv:1703.02757 (Gaussian).
"""

import numpy as np

from fedprompt_mpi.config import AttackName, PoisonConfig, RunConfig
from fedprompt_mpi.federation.rule import euclidean_norm


class Attack:
    """Base of the attacks, and the paper's: poisoned data alone, with the update boosted if asked for."""

    needs_last_update = False
    """Whether the attacker watches how the global vector moves."""
    bounds_training = False
    """Whether `constrain` does anything."""

    def __init__(self, config: PoisonConfig, last_update: np.ndarray | None = None) -> None:
        """Prepare the attack of a rank's malicious clients in one round.

        Args:
            config: the attack's settings.
            last_update: `[P]` float32, how the last round moved the global vector; None before there was one. Only
                attacks that say `needs_last_update` look at it.
        """
        self.config = config

    def constrain(self, delta: np.ndarray) -> np.ndarray:
        """Return what becomes of the client's delta `[P]` float32 after a local step."""
        return delta

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return what the client sends in place of its delta `[P]` float32."""
        return np.float32(self.config.boost) * delta


class NormBound(Attack):
    """Stay within a ball around the global vector, so that what is sent is no longer than `poison.norm_bound`.

    After each local step the delta is projected onto the ball of radius norm_bound / boost; boosted, it passes a
    server that clips at norm_bound untouched.

    References:
        Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963 (the norm-bounded attack).
    """

    bounds_training = True

    def constrain(self, delta: np.ndarray) -> np.ndarray:
        """Return delta * min(1, radius / norm(delta))."""
        radius = self.config.norm_bound / self.config.boost
        norm = euclidean_norm(delta)
        # one part in a million inside, so that rounding to float32 does not step over the bound
        return delta if norm <= radius else (delta.astype(np.float64) * (radius / norm * (1 - 1e-6))).astype(np.float32)


class Neurotoxin(Attack):
    """Keep off the coordinates that benign updates move most, so that they do not wash the backdoor out.

    What benign clients will move is guessed from how the last round moved the global vector: after each local step
    the delta is put back to 0 in the `poison.neurotoxin_share` of the coordinates where that was largest. In the
    first round of a run nothing is known, and nothing is kept off.

    References:
        Zhang et al., Neurotoxin, 2022, arXiv:2206.10341, Algorithm 1 (which masks gradients; under an optimiser with
        momentum, masking the delta is what keeps a coordinate still).
    """

    needs_last_update = True
    bounds_training = True

    def __init__(self, config: PoisonConfig, last_update: np.ndarray | None = None) -> None:
        """Find the coordinates to keep off; see `Attack`."""
        super().__init__(config, last_update)
        moved = np.zeros(0) if last_update is None else np.abs(last_update)
        count = int(config.neurotoxin_share * len(moved))
        self._most_moved = np.argsort(-moved, kind="stable")[:count].copy()  # not a view of all

    def constrain(self, delta: np.ndarray) -> np.ndarray:
        """Return the delta with the most moved coordinates at 0."""
        kept = delta.copy()
        kept[self._most_moved] = 0
        return kept


class SignFlip(Attack):
    """Send the opposite of what was learned: -boost * delta.

    References:
        Li et al., RSA: Byzantine-Robust Stochastic Aggregation, 2019, arXiv:1811.03761 (sign-flipping attacks).
    """

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the boosted delta with its sign changed."""
        return -super().send(delta, rng)


class Gaussian(Attack):
    """Send normal noise of standard deviation `poison.gaussian_std` instead of an update.

    References:
        Blanchard et al., Machine Learning with Adversaries, 2017, arXiv:1703.02757 (Gaussian Byzantine workers).
    """

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return boosted noise."""
        noise = self.config.gaussian_std * rng.standard_normal(len(delta))
        return super().send(noise.astype(np.float32), rng)


class NotANumber(Attack):
    """Send a delta that is NaN in one random coordinate: enough to ruin any mean."""

    value = np.nan

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the boosted delta with one coordinate ruined."""
        ruined = super().send(delta, rng).copy()
        ruined[rng.integers(len(ruined))] = self.value
        return ruined


class Infinite(NotANumber):
    """Send a delta that is infinite in one random coordinate."""

    value = np.inf


ATTACKS: dict[AttackName, type[Attack]] = {
    "none": Attack,
    "norm_bound": NormBound,
    "neurotoxin": Neurotoxin,
    "sign_flip": SignFlip,
    "gaussian": Gaussian,
    "nan": NotANumber,
    "inf": Infinite,
}


def attacking_clients(config: RunConfig) -> set[int]:
    """Return the clients that send something else than what they trained."""
    return set(config.poison.malicious(config.federation.clients)) if config.poison.attacks_update else set()


class Observer:
    """What an attacker who watches the broadcasts knows of how the global vector moves; nothing, if none needs it."""

    def __init__(self, config: PoisonConfig) -> None:
        """Start without a vector."""
        self.watches = bool(config.clients) and ATTACKS[config.attack].needs_last_update
        self._vectors: list[np.ndarray] = []

    def see(self, vector: np.ndarray) -> None:
        """Remember the vector `[P]` that has arrived, and the one before."""
        if self.watches:
            self._vectors = [*self._vectors[-1:], vector.copy()]

    @property
    def last_update(self) -> np.ndarray | None:
        """`[P]` float32, the last vector minus the one before; None if there have not been two."""
        return self._vectors[1] - self._vectors[0] if len(self._vectors) == 2 else None

    def state(self) -> dict[str, np.ndarray]:
        """Return the vector that arrived last, for the checkpoint."""
        return {"vector_before": self._vectors[-1]} if self._vectors else {}
