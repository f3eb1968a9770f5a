"""Clipping, noise and accounting: local differential privacy as in the paper, and central, user-level DP-FedAvg.

The noise comes from the run's seed, so that a run can be repeated. A deployment must draw it from a source that cannot
be repeated.

Legend: K clients, P parameters, q probability of a client to take part, S clipping norm, z noise multiplier.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedprompt_mpi.config import ClientConfig, FederationConfig, PrivacyConfig, RunConfig
from fedprompt_mpi.rules.aggregator_base import Aggregator, Updates, clip_factors

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
"""Renyi orders of the accountant; integers, for which the sampled Gaussian has a closed form."""
STEPS_OF_LOSS = 2000
"""Steps of the discrete privacy loss up to Renyi's epsilon. More take longer and change the fourth digit."""


class Spent(NamedTuple):
    """The privacy budget spent so far."""

    epsilon: float | None
    """The smallest that can be derived; None without a mechanism, and if none can be."""
    renyi: float | None = None
    """That of Renyi accounting, which is an upper bound; dp_fedavg alone."""


def add_laplace(delta: np.ndarray, scale: float, rng: np.random.Generator) -> None:
    """Add Laplace noise to an update `[P]` float32, in place.

    Args:
        delta: the update of the client.
        scale: b; the standard deviation is sqrt(2) b.
        rng: the client's own stream.

    References:
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268 (gradient clipping and Laplace noise).
        Dwork et al., Calibrating Noise to Sensitivity in Private Data Analysis, 2006, Proposition 1.
    """
    delta += rng.laplace(0.0, scale, len(delta)).astype(np.float32)


class Account:
    """The privacy budget that the rounds so far have spent for a client that took part in all of them.

    It covers the uploaded vectors. Their headers (loss, number of examples, seconds) have no noise, nor have the
    records of a run.
    """

    def __init__(self, config: RunConfig, parameters: int, rate: Callable[[float], float]) -> None:
        """Open an account.

        Args:
            config: mechanism, optimiser, clipping, noise.
            parameters: P.
            rate: progress in rounds -> learning rate.
        """
        self._config, self._parameters, self._rate = config, parameters, rate
        self._rounds, self._sum_of_rates = 0, 0.0
        if config.privacy.mechanism == "dp_fedavg":
            central_epsilon(config, 1)  # its imports take a second: do it before the first round

    def after(self, rounds: int) -> Spent:
        """Return the epsilon of a number of rounds."""
        if self._config.privacy.mechanism == "dp_fedavg":
            return central_epsilon(self._config, rounds)
        if self._config.privacy.mechanism == "none" or not bounds_update(self._config.client):
            return Spent(None)
        steps = self._config.client.steps
        for done in range(self._rounds, rounds):
            self._sum_of_rates += sum(self._rate(done + step / steps) for step in range(steps))
        self._rounds = rounds
        return Spent(ldp_epsilon(self._config, self._parameters, self._sum_of_rates))


def bounds_update(client: ClientConfig) -> bool:
    """Return True if local training bounds the change of the vector in one round; see `ldp_epsilon`."""
    return (
        client.optimizer == "sgd" and client.clip_norm is not None and not client.weight_decay and client.epochs is None
    )


def ldp_epsilon(config: RunConfig, parameters: int, sum_of_rates: float) -> float:
    """Return the epsilon of one client's uploaded vectors, of pure local differential privacy.

    With plain SGD each step moves the vector by at most lr * C in the Euclidean norm (C = client.clip_norm), hence
    a round's update by at most sqrt(P) * C * sum(lr) in the L1 norm, and the updates of any two data sets differ
    by at most twice that: epsilon = 2 sqrt(P) C sum(lr) / b. Rounds add up. Adaptive optimisers, weight decay and
    unclipped gradients leave the update without such a bound, and the number of epochs' steps is the data's own.

    Args:
        config: clipping, scale b.
        parameters: P.
        sum_of_rates: of the learning rates of all steps of all rounds.

    References:
        Dwork et al., Calibrating Noise to Sensitivity in Private Data Analysis, 2006, Proposition 1.
    """
    clip_norm = config.client.clip_norm
    assert clip_norm is not None
    return 2 * math.sqrt(parameters) * clip_norm * sum_of_rates / config.privacy.laplace_scale


class DPFedAvg(Aggregator):
    """The sum of clipped updates over the expected number of clients, plus normal noise.

    Each client takes part with probability q; its update is scaled to at most S; the sum is divided by q K, whatever
    the size of the cohort, and has noise of standard deviation z S / (q K) added. Clients count alike,
    whatever their number of examples. The guarantee is (epsilon, delta) for adding or removing one client.

    References:
        McMahan et al., Learning Differentially Private Recurrent Language Models, 2018, arXiv:1710.06963,
        Algorithm 1 with its fixed-denominator estimator.
    """

    weighs_examples = False

    def __init__(self, federation: FederationConfig, privacy: PrivacyConfig) -> None:
        """Take K, q and the mechanism's settings."""
        super().__init__(federation)
        self._privacy, self._expected = privacy, federation.fraction * federation.clients
        self.noise_std = privacy.noise_multiplier * privacy.clip_norm / self._expected

    @staticmethod
    def least_clients(malicious: int) -> int:
        """Return 0: the noise alone is a valid result."""
        return 0

    @property
    def bound(self) -> float:
        """S."""
        return self._privacy.clip_norm

    def bounded_factors(self, weights: np.ndarray, norms: np.ndarray, rounding: float) -> np.ndarray:
        """Scale deltas to S less what rounding may add, so that none is longer than S after it."""
        return weights * clip_factors(norms, np.maximum(self.bound - rounding / weights, 0.0))

    def weights(self, updates: Updates) -> np.ndarray:
        """Return 1 / (q K) * min(1, S / norm_k)."""
        return 1 / self._expected * clip_factors(updates.norms, self.bound)


def central_epsilon(config: RunConfig, rounds: int) -> Spent:
    """Return the epsilon of a number of rounds of DP-FedAvg, at `privacy.delta`.

    It is that of the privacy loss distribution, computed so that rounding makes it larger, not smaller, and never more
    than that of Renyi accounting.

    References:
        Koskela et al., Computing Tight Differential Privacy Guarantees Using FFT, 2020, arXiv:1906.03049.
        Doroshenko et al., Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions, 2022,
        arXiv:2207.04380.
        Mironov et al., Renyi Differential Privacy of the Sampled Gaussian Mechanism, 2019, arXiv:1908.10530.
    """
    import dp_accounting
    from dp_accounting import pld, rdp

    gaussian = dp_accounting.GaussianDpEvent(config.privacy.noise_multiplier)
    event = dp_accounting.PoissonSampledDpEvent(config.federation.fraction, gaussian)
    renyi = float(rdp.RdpAccountant(orders=ORDERS).compose(event, rounds).get_epsilon(config.privacy.delta))
    step = min(max(renyi / STEPS_OF_LOSS, 1e-5), 500.0)  # the package takes e to its power
    tight = pld.PLDAccountant(value_discretization_interval=step)
    return Spent(min(renyi, float(tight.compose(event, rounds).get_epsilon(config.privacy.delta))), renyi)
