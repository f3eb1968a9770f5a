"""Canaries through the run's own mechanism: never above the stated epsilon, unless the noise is taken out."""

import numpy as np
import pytest

from fedprompt_mpi import RunConfig
from fedprompt_mpi.audit.record import CanaryRecord
from fedprompt_mpi.config import ClientConfig, FederationConfig, PrivacyConfig
from fedprompt_mpi.federation import canary, privacy
from fedprompt_mpi.federation.canary import audit_mechanism


def _central(noise: float, fraction: float = 1.0, rounds: int = 4, seed: int = 0) -> CanaryRecord:
    config = RunConfig(
        seed=seed,
        federation=FederationConfig(rounds=rounds, fraction=fraction),
        privacy=PrivacyConfig(mechanism="dp_fedavg", noise_multiplier=noise, clip_norm=2.0),
    )
    return audit_mechanism(config, 2560)


def _local(scale: float, parameters: int) -> CanaryRecord:
    config = RunConfig(
        federation=FederationConfig(rounds=2),
        client=ClientConfig(optimizer="sgd", lr=0.1, steps=5),
        privacy=PrivacyConfig(mechanism="ldp", laplace_scale=scale),
    )
    return audit_mechanism(config, parameters)


@pytest.mark.parametrize(("noise", "fraction", "rounds"), [(4.0, 1.0, 4), (1.0, 0.5, 8), (100.0, 1.0, 2)])
def test_dp_fedavg_keeps_what_its_accountant_states(noise: float, fraction: float, rounds: int) -> None:
    """The Gaussian estimate is near the accountant's epsilon where every client takes part: that is tight."""
    found = [_central(noise, fraction, rounds, seed) for seed in range(4)]
    for one in found:
        assert one.stated is not None and one.estimate is not None
        assert one.bound <= one.stated
    if fraction == 1:
        assert np.mean([one.estimate or 0.0 for one in found]) == pytest.approx(found[0].stated, abs=0.4)


def test_without_its_noise_dp_fedavg_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    made = privacy.DPFedAvg.__init__

    def without_noise(self: privacy.DPFedAvg, *arguments: object) -> None:
        made(self, *arguments)  # pyright: ignore[reportArgumentType]
        self.noise_std = 0.0

    monkeypatch.setattr(privacy.DPFedAvg, "__init__", without_noise)
    found = _central(4.0)
    assert found.stated is not None and found.stated < found.bound


def test_without_its_clipping_dp_fedavg_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary's update is many times as long as the norm."""
    monkeypatch.setattr(privacy.DPFedAvg, "bounded_factors", lambda self, weights, norms, rounding: weights)
    found = _central(8.0)
    assert found.stated is not None and found.bound > found.stated


def test_ldp_keeps_what_it_states() -> None:
    """Of one parameter the bound is nearly reached; of many it is far, since no sum of signs is all of one sign."""
    one = _local(0.5, 1)
    assert one.stated == pytest.approx(4.0) and 1.0 < one.bound <= 4.0
    many = _local(10.0, 2560)
    assert many.stated is not None and many.bound <= 0.2 * many.stated


def test_without_its_noise_ldp_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "add_laplace", lambda upload, scale, rng: None)
    found = _local(1.0, 1)
    assert found.stated is not None and found.bound == pytest.approx(found.most) and found.bound > found.stated
