"""Noise as large as it says, epsilons that agree with what can be worked out by hand."""

import math
import statistics
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi.config import ClientConfig, FederationConfig, PrivacyConfig, RunConfig, SettingsError
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.privacy import Account, DPFedAvg, add_laplace, central_epsilon
from fedprompt_mpi.rules.aggregator_base import Updates
from fedprompt_mpi.rundir.formats import format_epsilon


def _dp(fraction: float = 0.5, clients: int = 4, **settings: float) -> RunConfig:
    return RunConfig(
        federation=FederationConfig(clients=clients, fraction=fraction),
        privacy=PrivacyConfig(mechanism="dp_fedavg", **settings),  # pyright: ignore
    )


def _weights(config: RunConfig, norms: list[float]) -> np.ndarray:
    updates = Updates(
        clients=np.arange(len(norms)), num_examples=np.arange(len(norms)) + 1.0, norms=np.array(norms), parameters=1
    )
    return DPFedAvg(config.federation, config.privacy).weights(updates)


def test_dp_fedavg_by_hand() -> None:
    """Half of four clients are expected: deltas are clipped to 2 and divided by 2, however many came."""
    config = _dp(clip_norm=2.0, noise_multiplier=1.5)
    np.testing.assert_allclose(_weights(config, [1.0, 8.0, 0.0]), [0.5, 0.125, 0.5])
    assert DPFedAvg(config.federation, config.privacy).noise_std == pytest.approx(1.5 * 2.0 / 2)
    assert len(_weights(config, [])) == 0  # nobody came: noise alone


def test_a_huge_clip_and_everybody_is_the_mean() -> None:
    np.testing.assert_allclose(_weights(_dp(fraction=1.0, clip_norm=1e9), [1.0, 8.0, 3.0, 2.0]), 0.25)


def test_each_client_takes_part_by_itself() -> None:
    config = _dp(fraction=0.3, clients=10)
    sizes = [len(draw_cohort(config, 1, t).clients) for t in range(1, 2001)]
    assert np.mean(sizes) == pytest.approx(3.0, abs=0.15)
    assert np.var(sizes) == pytest.approx(10 * 0.3 * 0.7, rel=0.15)  # binomial; a fixed size has none
    assert min(sizes) == 0


def test_epsilon_of_one_gaussian_round() -> None:
    """Without sampling, one round at z = 4: the optimal order gives 1/(2 z^2) + sqrt(2 log(1/delta)) / z, at most."""
    config = _dp(fraction=1.0, noise_multiplier=4.0)
    classic = 1 / (2 * 16) + math.sqrt(2 * math.log(1e5)) / 4  # Mironov 2017, arXiv:1702.07476, Proposition 3
    assert 0.75 * classic < (central_epsilon(config, 1).renyi or 0) <= classic


def test_epsilon_grows_with_rounds_and_falls_with_sampling_and_noise() -> None:
    base = _central(10)
    assert _central(20) > base
    assert _central(10, fraction=0.1) < base
    assert _central(10, noise_multiplier=2.0) < base
    assert Account(_dp(), 100, lambda progress: 1.0).after(10).epsilon == base


def _central(rounds: int, **settings: Any) -> float:
    epsilon = central_epsilon(_dp(**settings), rounds).epsilon
    assert epsilon is not None
    return epsilon


@pytest.mark.parametrize("rounds", [1, 7, 50])
def test_epsilon_of_unsampled_rounds_is_exact(rounds: int) -> None:
    """T rounds at z are one at z / sqrt(T), whose delta has a closed form.

    References:
        Balle and Wang, Improving the Gaussian Mechanism, 2018, arXiv:1805.06530, Theorem 8.
    """
    epsilon, mu = _central(rounds, fraction=1.0, noise_multiplier=3.0), math.sqrt(rounds) / 3.0
    normal = statistics.NormalDist().cdf
    delta = normal(mu / 2 - epsilon / mu) - math.exp(epsilon) * normal(-mu / 2 - epsilon / mu)
    assert 0.99e-5 < delta <= 1e-5  # it is rounded up, so that the delta is no larger


def test_epsilon_is_the_tight_one() -> None:
    """At q = 0.2, z = 0.5, T = 50 and delta 1e-3 Renyi accounting says more than twice as much."""
    spent = central_epsilon(_dp(fraction=0.2, clients=100, noise_multiplier=0.5, delta=1e-3), 50)
    assert spent.epsilon == pytest.approx(28.56, abs=0.02)
    assert spent.renyi == pytest.approx(62.80, abs=0.01)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("noise_multiplier", [0.001, 0.01, 0.05, 0.4, 1.0, 20.0, 1e6])
def test_epsilon_is_never_above_renyi_s(fraction: float, noise_multiplier: float) -> None:
    config = _dp(fraction=fraction, clients=100, noise_multiplier=noise_multiplier)
    for rounds in (1, 30):
        spent = central_epsilon(config, rounds)
        assert spent.epsilon is not None
        assert spent.renyi is not None
        assert 0 <= spent.epsilon <= spent.renyi < math.inf


def test_an_epsilon_is_said_in_words() -> None:
    assert format_epsilon(0.5) == "epsilon 0.50, a strong guarantee"
    assert format_epsilon(8) == "epsilon 8.00, a reasonable guarantee"
    assert format_epsilon(28.56) == "epsilon 28.56, a weak guarantee"
    assert format_epsilon(148_732_101.2) == "epsilon 148,732,101, this protects nothing"


def test_laplace_noise_has_its_scale() -> None:
    delta = np.ones(50_000, dtype=np.float32)
    add_laplace(delta, 0.5, np.random.default_rng(0))
    assert delta.dtype == np.float32
    assert np.abs(delta - 1).mean() == pytest.approx(0.5, rel=0.02)  # the mean distance of a Laplace variable is b
    assert delta.mean() == pytest.approx(1.0, abs=0.02)


def _ldp(**client: object) -> RunConfig:
    return RunConfig(
        client=ClientConfig(**client),  # pyright: ignore
        privacy=PrivacyConfig(mechanism="ldp", laplace_scale=0.1),
    )


def test_local_epsilon_by_hand() -> None:
    """P = 100, C = 2, lr = 0.01, 5 steps, 3 rounds, b = 0.1: 2 * 10 * 2 * 0.05 / 0.1 = 20 a round."""
    config = _ldp(optimizer="sgd", clip_norm=2.0, steps=5)
    assert Account(config, 100, lambda progress: 0.01).after(1).epsilon == pytest.approx(20.0)
    assert Account(config, 100, lambda progress: 0.01).after(3).epsilon == pytest.approx(60.0)
    by_round = Account(config, 100, lambda progress: 0.01)
    assert [by_round.after(t).epsilon for t in (1, 2, 3)] == pytest.approx([20.0, 40.0, 60.0])
    falling = Account(config, 100, lambda progress: 0.01 * (1 - progress)).after(1).epsilon
    assert falling == pytest.approx(20.0 * (1 + 0.8 + 0.6 + 0.4 + 0.2) / 5)


@pytest.mark.parametrize(
    "client",
    [
        {},
        {"optimizer": "sgd", "clip_norm": None},
        {"optimizer": "sgd", "weight_decay": 0.1},
        {"optimizer": "sgd", "epochs": 1},
    ],
)
def test_no_epsilon_where_nothing_bounds_the_update(client: dict[str, object]) -> None:
    assert Account(_ldp(**client), 100, lambda progress: 0.01).after(1) == (None, None)


def test_no_mechanism_no_epsilon() -> None:
    assert Account(RunConfig(), 100, lambda progress: 0.01).after(5) == (None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.0}, "privacy.delta"),
        ({"laplace_scale": 0.0}, "laplace_scale"),
        ({"noise_multiplier": -1.0}, "noise_m"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PrivacyConfig(**settings)  # pyright: ignore


def test_dp_fedavg_takes_no_other_rule() -> None:
    with pytest.raises(SettingsError, match="leave the aggregator out"):
        RunConfig(federation=FederationConfig(aggregator="median"), privacy=PrivacyConfig(mechanism="dp_fedavg"))
