"""Attacks of malicious clients on their update, in addition to training on poisoned data.

An attack may constrain the local training after each step, and replace the update that is sent after the last step.
The result is multiplied by `poison.boost` (model replacement). NaN, Inf and Gaussian noise exist to test defences.
Attacks on which several malicious clients agree are in collusion.py.

Legend: P parameters. A delta is local minus global.

References:
    Bagdasaryan et al., How To Backdoor Federated Learning, 2020, arXiv:1807.00459, Equation 3 (boost).
    Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963 (norm bound).
    Zhang et al., Neurotoxin: Durable Backdoors in Federated Learning, 2022, arXiv:2206.10341, Algorithm 1.
    Blanchard et al., Machine Learning with Adversaries, 2017, arXiv:1703.02757 (Gaussian).
"""

import dataclasses
from typing import Any

import numpy as np

from fedprompt_mpi.rules.aggregator_base import euclidean_norm
from fedprompt_mpi.rules.attack_base import Attack
from fedprompt_mpi.rules.collusion import CollusionOptions
from fedprompt_mpi.rules.registry import attacks
from fedprompt_mpi.rules.setting import Comparison, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormBoundOptions:
    """Options of norm_bound."""

    norm_bound: float = setting(1.0, above=0, may_differ=Comparison.CLEAN_RUN)
    """norm_bound: largest norm of the update that is sent, boost included."""


@attacks.register("norm_bound", options=NormBoundOptions)
class NormBound(Attack):
    """Stay within a ball around the global vector, so that the norm of the sent update is at most `poison.norm_bound`.

    After each local step the delta is projected onto the ball of radius norm_bound / boost; boosted, it passes a
    server that clips at norm_bound unchanged.

    References:
        Sun et al., Can You Really Backdoor Federated Learning?, 2019, arXiv:1911.07963 (the norm-bounded attack).
    """

    bounds_training = True

    def constrain(self, delta: np.ndarray) -> np.ndarray:
        """Return delta * min(1, radius / norm(delta))."""
        radius = self.options.norm_bound / self.options.boost
        norm = euclidean_norm(delta)
        # one part in a million inside, so that rounding to float32 does not step over the bound
        return delta if norm <= radius else (delta.astype(np.float64) * (radius / norm * (1 - 1e-6))).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeurotoxinOptions:
    """Options of neurotoxin."""

    neurotoxin_share: float = setting(0.05, at_least=0, below=1, may_differ=Comparison.CLEAN_RUN)
    """neurotoxin: share of the coordinates that the attacker leaves unchanged."""


@attacks.register("neurotoxin", options=NeurotoxinOptions)
class Neurotoxin(Attack):
    """Leave the coordinates unchanged that benign updates move most, so that they do not overwrite the backdoor.

    The last change of the global vector predicts the coordinates that benign clients will move. After each local step
    the delta is reset to 0 in the `poison.neurotoxin_share` of the coordinates where that change was largest. In the
    first round of a run there is no last change, and no coordinate is reset.

    References:
        Zhang et al., Neurotoxin, 2022, arXiv:2206.10341, Algorithm 1 (which masks gradients; under an optimiser with
        momentum, masking the delta is what keeps a coordinate still).
    """

    needs_last_update = True
    bounds_training = True

    def __init__(self, options: Any, last_update: np.ndarray | None = None) -> None:
        """Find the coordinates to leave unchanged; see `Attack`."""
        super().__init__(options, last_update)
        moved = np.zeros(0) if last_update is None else np.abs(last_update)
        count = int(options.neurotoxin_share * len(moved))
        self._most_moved = np.argsort(-moved, kind="stable")[:count].copy()  # a view would keep all of them in memory

    def constrain(self, delta: np.ndarray) -> np.ndarray:
        """Return the delta with the most moved coordinates at 0."""
        kept = delta.copy()
        kept[self._most_moved] = 0
        return kept


@attacks.register("sign_flip")
class SignFlip(Attack):
    """Send the negative of the trained update: -boost * delta.

    References:
        Li et al., RSA: Byzantine-Robust Stochastic Aggregation, 2019, arXiv:1811.03761 (sign-flipping attacks).
    """

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the boosted delta with its sign changed."""
        return -super().send(delta, rng)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianOptions:
    """Options of gaussian."""

    gaussian_std: float = setting(1.0, above=0, may_differ=Comparison.CLEAN_RUN)
    """gaussian: standard deviation of the noise that is sent instead of an update."""


@attacks.register("gaussian", options=GaussianOptions)
class Gaussian(Attack):
    """Send normal noise of standard deviation `poison.gaussian_std` instead of an update.

    References:
        Blanchard et al., Machine Learning with Adversaries, 2017, arXiv:1703.02757 (Gaussian Byzantine workers).
    """

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return boosted noise."""
        noise = self.options.gaussian_std * rng.standard_normal(len(delta))
        return super().send(noise.astype(np.float32), rng)


@attacks.register("nan")
class NotANumber(Attack):
    """Send a delta that is NaN in one random coordinate: enough to make any mean NaN."""

    value = np.nan

    def send(self, delta: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the boosted delta with one coordinate replaced."""
        spoiled = super().send(delta, rng).copy()
        spoiled[rng.integers(len(spoiled))] = self.value
        return spoiled


@attacks.register("inf")
class Infinite(NotANumber):
    """Send a delta that is infinite in one random coordinate."""

    value = np.inf


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackOptions(CollusionOptions, GaussianOptions, NeurotoxinOptions, NormBoundOptions):
    """The options of all attacks, as the section `poison` holds them."""
