"""What malicious clients send, by hand and by its limits."""

from typing import Any

import numpy as np
import pytest

from fedprompt_mpi.config import FederationConfig, PoisonConfig, RunConfig, SettingsError
from fedprompt_mpi.federation.adversary import Observer, attacking_clients
from fedprompt_mpi.plugins import contract_of_rules
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.attack_base import Attack
from fedprompt_mpi.rules.collusion import ColludingAttack, Meeting, fit, moved_by, supported_deviation

DELTA = np.array([3.0, -4.0, 0.0, 12.0], dtype=np.float32)  # norm 13


def _attack(name: str, last_update: np.ndarray | None = None, **settings: Any) -> Attack:
    config = PoisonConfig(clients=[0], attack=name, **{"neurotoxin_share": 0.5, **settings})  # pyright: ignore
    return registry.attacks[name](config, last_update)  # pyright: ignore


def _send(attack: Attack, delta: np.ndarray = DELTA, seed: int = 0) -> np.ndarray:
    if isinstance(attack, ColludingAttack):
        attack.meet(_meeting(np.stack([delta, 2 * delta])))
    return attack.send(delta.copy(), np.random.default_rng(seed))


def _meeting(deltas: np.ndarray, clients: int = 10, rule: str = "median", **settings: Any) -> Meeting:
    """Return what attackers of a federation of 10 know, who have trained the deltas `[m, P]`."""
    config = FederationConfig(clients=clients, aggregator=rule, **settings)
    return Meeting(
        deltas=deltas.astype(np.float32),
        clients=clients,
        make_rule=lambda: registry.aggregators[rule](config),
        rng=np.random.default_rng(0),
    )


@pytest.mark.parametrize("name", registry.attacks)
class TestContract:
    @pytest.mark.parametrize("what", contract_of_rules.ATTACKS)
    def test_it_keeps_the_contract(self, name: str, what: str) -> None:
        contract_of_rules.ATTACKS[what](contract_of_rules.attack_of(name))

    def test_its_docstring_cites(self, name: str) -> None:
        if name not in ("none", "nan", "inf"):  # the module's head cites the first; the others are nobody's
            assert "References:" in (type(_attack(name)).__doc__ or "")


def test_none_at_boost_one_sends_what_was_trained() -> None:
    np.testing.assert_array_equal(_send(_attack("none")), DELTA)


def test_model_replacement_by_hand() -> None:
    """Ten equal clients, nine of which stay where they are: boosted by 10, the mean is the attacker's own delta."""
    sent = _send(_attack("none", boost=10.0))
    np.testing.assert_allclose((sent + 9 * np.zeros_like(sent)) / 10, DELTA, rtol=1e-6)


def test_norm_bound_by_hand() -> None:
    attack = _attack("norm_bound", norm_bound=6.5)
    np.testing.assert_allclose(attack.constrain(DELTA), DELTA / 2, rtol=1e-5)
    np.testing.assert_array_equal(attack.constrain(DELTA / 4), DELTA / 4)  # inside the ball nothing happens
    again = attack.constrain(attack.constrain(DELTA))
    np.testing.assert_array_equal(again, attack.constrain(DELTA))


@pytest.mark.parametrize("boost", [1.0, 7.0])
def test_norm_bound_holds_after_the_boost(boost: float) -> None:
    attack = _attack("norm_bound", norm_bound=2.0, boost=boost)
    sent = _send(attack, attack.constrain(1e5 * DELTA))
    assert 1.999 < np.linalg.norm(sent.astype(np.float64)) <= 2.0


def test_neurotoxin_by_hand() -> None:
    """The last update moved coordinates 1 and 2 most: half of four are kept off."""
    attack = _attack("neurotoxin", np.array([0.1, -5, 2, 0], dtype=np.float32))
    np.testing.assert_array_equal(attack.constrain(DELTA), [3, 0, 0, 12])


def test_neurotoxin_keeps_off_nothing_before_it_has_seen_anything() -> None:
    np.testing.assert_array_equal(_attack("neurotoxin").constrain(DELTA), DELTA)
    off = _attack("neurotoxin", DELTA.copy(), neurotoxin_share=0.0)
    np.testing.assert_array_equal(off.constrain(DELTA), DELTA)


def test_sign_flip_by_hand() -> None:
    np.testing.assert_array_equal(_send(_attack("sign_flip", boost=2.0)), -2 * DELTA)


def test_gaussian_has_the_standard_deviation_that_is_set() -> None:
    sent = _send(_attack("gaussian", gaussian_std=3.0), np.zeros(20_000, dtype=np.float32))
    assert sent.std() == pytest.approx(3.0, rel=0.02)
    assert sent.mean() == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize(("name", "is_ruined"), [("nan", np.isnan), ("inf", np.isinf)])
def test_one_coordinate_is_ruined(name: str, is_ruined: Any) -> None:
    sent = _send(_attack(name))
    assert is_ruined(sent).sum() == 1
    np.testing.assert_array_equal(sent[~is_ruined(sent)], DELTA[~is_ruined(sent)])


THREE = np.array([[0.0, 2], [1, 2], [2, 2]])
"""Updates with mean (1, 2) and deviation (1, 0); their largest distance is 2."""


def _agreed(name: str, deltas: np.ndarray = THREE, **settings: Any) -> np.ndarray:
    attack = _attack(name, **settings)
    assert isinstance(attack, ColludingAttack)
    attack.meet(_meeting(deltas))
    return attack.send(deltas[0].astype(np.float32), np.random.default_rng(0))


def test_alie_by_hand() -> None:
    """Three of ten: s = 5 + 1 - 3 supporters of 7, so that Phi(z) = 4 / 7 and z = 0.18."""
    assert supported_deviation(10, 3) == pytest.approx(0.18, abs=0.001)
    np.testing.assert_allclose(_agreed("alie"), [1 + supported_deviation(10, 3), 2], rtol=1e-6)
    np.testing.assert_allclose(_agreed("alie", alie_factor=1.5), [2.5, 2], rtol=1e-6)
    assert supported_deviation(50, 24) == pytest.approx(1.426, abs=0.001)  # 2 of 26 support: Phi(z) = 24 / 26


def test_ipm_by_hand() -> None:
    np.testing.assert_allclose(_agreed("ipm", ipm_factor=0.5), [-0.5, -1], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "direction", "expected"),
    [
        ("min_max", "std", [0.0, 2]),  # from (1, 2) to (0, 2), 2 from (2, 2), as far as (0, 2) is
        ("min_max", "sign", [1 - 0.822876, 2 - 0.822876]),  # (1 + g)^2 + g^2 = 4
        ("min_sum", "std", [0.0, 2]),  # 3 g^2 + 2 = 5, at g = 1
        ("min_sum", "sign", [1 - 0.707107, 2 - 0.707107]),  # 6 g^2 + 2 = 5
    ],
)
def test_min_max_and_min_sum_by_hand(name: str, direction: str, expected: list[float]) -> None:
    np.testing.assert_allclose(_agreed(name, perturbation=direction), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["min_max", "min_sum"])
@pytest.mark.parametrize("direction", ["std", "unit", "sign"])
def test_no_larger_step_would_keep_the_bound(name: str, direction: str) -> None:
    rng = np.random.default_rng(1)
    deltas = rng.standard_normal((4, 30)) + 1
    mean, sent = deltas.mean(axis=0), _agreed(name, deltas, perturbation=direction).astype(np.float64)
    squares = ((deltas[:, None] - deltas) ** 2).sum(axis=2)
    combined, bound = (np.max, squares.max()) if name == "min_max" else (np.sum, squares.sum(axis=1).max())
    for stretch, is_within in ((0.999, True), (1.001, False)):
        crafted = mean + stretch * (sent - mean)
        assert (combined(((deltas - crafted) ** 2).sum(axis=1)) <= bound) == is_within


def test_against_trimmed_mean_by_hand() -> None:
    """The first coordinate's mean rises: between 3 and 4 deviations below it; the second has no deviation."""
    sent = _agreed("against_trimmed_mean")
    assert 1 - 4 <= sent[0] <= 1 - 3
    assert sent[1] == 2
    attack = _attack("against_trimmed_mean")
    assert isinstance(attack, ColludingAttack)
    attack.meet(_meeting(THREE))
    draws = [attack.send(DELTA[:2], np.random.default_rng(seed))[0] for seed in range(50)]
    assert min(draws) < -2.9 and max(draws) > -2.1  # each attacker draws its own


def test_a_lone_attacker_hides_in_nothing() -> None:
    for name in ("alie", "min_max", "min_sum"):
        np.testing.assert_array_equal(_agreed(name, DELTA[None]), DELTA)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "geometric_median"])
@pytest.mark.parametrize("name", ["alie", "ipm"])
def test_a_fitted_factor_moves_the_rule_furthest(name: str, rule: str) -> None:
    """No factor of a fine grid moves it further than a hundredth more."""
    rng = np.random.default_rng(2)
    deltas = (np.linspace(-1, 1, 40) + 0.3 * rng.standard_normal((3, 40))).astype(np.float32)
    honest = (np.linspace(-1, 1, 40) + 0.3 * rng.standard_normal((7, 40))).astype(np.float32)
    meeting = _meeting(deltas, rule=rule, assumed_malicious=3)

    def moved(factor: float) -> float:
        crafted = meeting.mean + factor * meeting.std if name == "alie" else -factor * meeting.mean
        return moved_by(meeting.make_rule(), honest, crafted.astype(np.float32), 3)

    grid = max(moved(factor) for factor in np.linspace(-20, 20, 801))
    assert moved(fit(moved)) >= 0.99 * grid


def test_an_observer_sees_how_the_vector_moves() -> None:
    observer = Observer(PoisonConfig(clients=[1], attack="neurotoxin"))
    vector = np.zeros(2, dtype=np.float32)
    assert observer.last_update(vector) is None
    observer.note(vector)
    vector += 1  # in place, as the server does
    np.testing.assert_array_equal(observer.last_update(vector), [1, 1])
    np.testing.assert_array_equal(observer.state()["vector_before"], [0, 0])


def test_an_observer_that_no_attack_needs_keeps_nothing() -> None:
    for config in (PoisonConfig(clients=[1], boost=3.0), PoisonConfig(attack="neurotoxin")):
        observer = Observer(config)
        observer.note(np.ones(2, dtype=np.float32))
        assert observer.state() == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"boost": 0.0}, "poison.boost is 0.0"),
        ({"boost": float("nan")}, "poison.boost is nan"),
        ({"norm_bound": -1.0}, "poison.norm_bound"),
        ({"neurotoxin_share": 1.0}, "poison.neurotoxin_share is 1.0"),
        ({"rate": 1.1}, "poison.rate is 1.1"),
        ({"rate": float("nan")}, "poison.rate is nan"),
        ({"clients": [1, 1]}, "name each client once"),
        ({"clients": [1], "trigger": " "}, "poison.trigger is empty, poison.kind is word"),
        ({"count": 1, "kind": "natural"}, "poison.kind is natural and there are malicious clients: give a trigger"),
        ({"count": 1, "kind": "composite", "trigger": "cf"}, "poison.kind is composite but poison.trigger is 'cf'"),
        ({"count": -1}, "poison.count is -1"),
        ({"count": 1, "fitted": True, "attack": "min_max"}, "poison.fitted is true but poison.attack is min_max"),
        (
            {"distributed": True, "clients": "all"},
            "poison.trigger is 'cf' and poison.kind word: give a trigger of two or more words",
        ),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PoisonConfig(**settings)


def test_malicious_clients_are_drawn_by_the_seed() -> None:
    """Each client as often as any other, the same whatever else is set."""
    drawn = [RunConfig(seed=seed, poison=PoisonConfig(count=2)).malicious for seed in range(300)]
    assert all(len(set(ids)) == 2 and ids == sorted(ids) for ids in drawn)
    assert min(np.bincount(np.ravel(drawn), minlength=10)) > 30
    assert RunConfig(seed=7, poison=PoisonConfig(count=2, boost=3.0)).malicious == drawn[7]
    with pytest.raises(SettingsError, match=r"poison\.count is 11 but federation\.clients is 10"):
        RunConfig(poison=PoisonConfig(count=11))
    with pytest.raises(SettingsError, match="name clients or have them drawn"):
        PoisonConfig(count=1, clients=[2])


def test_who_is_malicious() -> None:
    assert RunConfig(poison=PoisonConfig(clients=[4, 2])).malicious == [2, 4]
    assert RunConfig(federation=FederationConfig(clients=3), poison=PoisonConfig(clients="all")).malicious == [0, 1, 2]
    assert RunConfig().malicious == []
    PoisonConfig(clients=[1], trigger="", attack="sign_flip")  # no data is poisoned, the update is attacked
    PoisonConfig(trigger="cf mn", distributed=True)  # the clean run of a distributed trigger
    attacked = RunConfig(poison=PoisonConfig(clients=[4, 2], boost=2.0))
    assert attacking_clients(attacked) == {2, 4}
    assert attacking_clients(RunConfig(poison=PoisonConfig(clients=[4]))) == set()
