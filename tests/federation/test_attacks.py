"""What malicious clients send, by hand and by its limits."""

from typing import Any, get_args

import numpy as np
import pytest

from fedprompt_mpi.config import PoisonConfig, RunConfig, SettingsError
from fedprompt_mpi.federation.adversary import Observer, attacking_clients
from fedprompt_mpi.rules.attacks import ATTACKS, Attack, AttackName

DELTA = np.array([3.0, -4.0, 0.0, 12.0], dtype=np.float32)  # norm 13


def _attack(name: str, last_update: np.ndarray | None = None, **settings: Any) -> Attack:
    config = PoisonConfig(clients=[0], attack=name, **{"neurotoxin_share": 0.5, **settings})  # pyright: ignore
    return ATTACKS[name](config, last_update)  # pyright: ignore


def _send(attack: Attack, delta: np.ndarray = DELTA, seed: int = 0) -> np.ndarray:
    return attack.send(delta.copy(), np.random.default_rng(seed))


def test_every_attack_can_be_set() -> None:
    assert set(ATTACKS) == set(get_args(AttackName))


@pytest.mark.parametrize("name", ATTACKS)
class TestContract:
    def test_shape_and_dtype(self, name: str) -> None:
        attack = _attack(name, last_update=DELTA[::-1].copy())
        for made in (attack.constrain(DELTA.copy()), _send(attack)):
            assert made.shape == DELTA.shape
            assert made.dtype == np.float32

    def test_it_depends_on_its_stream_alone(self, name: str) -> None:
        np.testing.assert_array_equal(_send(_attack(name), seed=3), _send(_attack(name), seed=3))

    def test_boost_multiplies_what_is_sent(self, name: str) -> None:
        np.testing.assert_allclose(_send(_attack(name, boost=10.0)), 10 * _send(_attack(name)), rtol=1e-6)

    def test_bounds_are_only_claimed_where_there_are_any(self, name: str) -> None:
        attack = _attack(name, last_update=DELTA.copy())
        changed = not np.array_equal(attack.constrain(DELTA.copy()), DELTA)
        assert changed == attack.bounds_training

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
        ({"clients": [1], "trigger": " "}, "poison.trigger is empty"),
        ({"distributed": True, "clients": "all"}, "poison.trigger is 'cf': give two or more words"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PoisonConfig(**settings)


def test_who_is_malicious() -> None:
    assert PoisonConfig(clients=[4, 2]).malicious(10) == [2, 4]
    assert PoisonConfig(clients="all").malicious(3) == [0, 1, 2]
    assert RunConfig().poison.malicious(10) == []
    PoisonConfig(clients=[1], trigger="", attack="sign_flip")  # no data is poisoned, the update is attacked
    PoisonConfig(trigger="cf mn", distributed=True)  # the clean run of a distributed trigger
    attacked = RunConfig(poison=PoisonConfig(clients=[4, 2], boost=2.0))
    assert attacking_clients(attacked) == {2, 4}
    assert attacking_clients(RunConfig(poison=PoisonConfig(clients=[4]))) == set()
