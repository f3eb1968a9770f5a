"""Every rule by hand, at its limits, and all of them through one suite."""

import functools
from typing import Any

import numpy as np
import pytest

from fedprompt_mpi.config import FederationConfig, SettingsError
from fedprompt_mpi.plugins import contract_of_rules
from fedprompt_mpi.plugins.contract_of_rules import K, P, combined, rule_of, updates_of
from fedprompt_mpi.rules import pairwise, registry
from fedprompt_mpi.rules.aggregator_base import Aggregator
from fedprompt_mpi.rules.angle import FoolsGold
from fedprompt_mpi.rules.distance import Bulyan, bulyan_choice, krum_order
from fedprompt_mpi.rules.mixing import Mixed
from fedprompt_mpi.rules.pairwise import PairwiseRule, add_inner_products

RULES = [*registry.aggregators, *(f"{name} mixed" for name in registry.aggregators)]
SERVER = K  # the id of the server's own update, which FLTrust has first


def _rule(name: str, **settings: Any) -> Aggregator:
    """Return a rule of K clients, behind nearest-neighbour mixing if its name ends so."""
    name, mixes, _ = name.partition(" mixed")
    rule = rule_of(name)(mixing=bool(mixes), **settings)
    if not mixes:
        return rule
    mixed: Any = Mixed(rule)
    mixed.withstands = name not in ("fedavg", "foolsgold")
    mixed.mean_at = None if name == "fltrust" else {**(rule.mean_at or {}), "assumed_malicious": 0}  # all are mixed
    mixed.keeps_updates = rule.keeps_updates
    return mixed


def _aggregate(
    rule: Aggregator, deltas: np.ndarray, counts: np.ndarray | None = None, clients: np.ndarray | None = None
) -> np.ndarray:
    return combined(rule, deltas, updates_of(rule, deltas, counts, clients))


@pytest.mark.parametrize("name", RULES)
class TestContract:
    @pytest.mark.parametrize("what", contract_of_rules.RULES)
    def test_it_keeps_the_contract(self, name: str, what: str) -> None:
        contract_of_rules.RULES[what](functools.partial(_rule, name))

    def test_too_few_clients_are_refused(self, name: str) -> None:
        needed, (plain, mixes, _) = _rule(name).least_clients(3), name.partition(" mixed")
        given: dict[str, Any] = {"aggregator": plain, "mixing": bool(mixes), "assumed_malicious": 3}
        FederationConfig(**given, clients=needed)
        if needed == 1:
            return
        with pytest.raises(SettingsError, match=rf"needs {needed} clients in a round, but there are {needed - 1}"):
            FederationConfig(**given, clients=needed - 1)

    def test_its_docstring_says_where_it_is_from_and_when_it_breaks(self, name: str) -> None:
        text = type(_rule(name)).__doc__ or ""
        assert "References:" in text
        assert "reakdown" in text or "No breakdown point" in text


def test_only_what_has_no_such_limit_states_none() -> None:
    without = {name for name in registry.aggregators if _rule(name).mean_at is None}
    assert without == {"median", "geometric_median", "krum", "foolsgold", "fltrust", "flame", "freqfed"}
    assert {name for name in registry.aggregators if not _rule(name).withstands} == {"fedavg"}


def test_foolsgold_is_the_mean_where_nobody_is_like_another() -> None:
    deltas = np.eye(K, P, dtype=np.float32)
    np.testing.assert_allclose(_aggregate(_rule("foolsgold"), deltas), deltas.mean(axis=0), rtol=1e-6, atol=1e-9)


def _columns(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]


def test_fedavg_by_hand() -> None:
    deltas = np.array([[1.0, -2.0], [5.0, 2.0]], dtype=np.float32)
    np.testing.assert_array_equal(_aggregate(_rule("fedavg"), deltas, np.array([3.0, 1.0])), [2.0, -1.0])
    np.testing.assert_array_equal(_aggregate(_rule("fedavg"), deltas[:1], np.array([7.0])), [1.0, -2.0])


def test_fedavg_sums_in_float64() -> None:
    """A thousand small deltas beside a large one are not lost, as they would be in float32."""
    deltas = np.full((1001, 1), 1e-4, dtype=np.float32)
    deltas[0] = 1e4
    expected = (1e4 + 1000 * float(np.float32(1e-4))) / 1001
    assert _aggregate(_rule("fedavg"), deltas)[0] == pytest.approx(expected, rel=1e-12)


def test_median_by_hand() -> None:
    assert _aggregate(_rule("median"), _columns(3, -100, 1))[0] == 1
    assert _aggregate(_rule("median"), _columns(3, -100, 1, 2))[0] == 1.5


def test_trimmed_mean_by_hand() -> None:
    assert _aggregate(_rule("trimmed_mean", assumed_malicious=1), _columns(1, 2, 6, -50, 99))[0] == 3
    assert _aggregate(_rule("trimmed_mean", assumed_malicious=2), _columns(1, 2, 6, -50, 99))[0] == 2


def test_norm_clip_by_hand() -> None:
    deltas = np.array([[3.0, 4.0], [0.3, 0.4]], dtype=np.float32)  # norms 5 and 0.5
    np.testing.assert_allclose(_aggregate(_rule("norm_clip", clip_norm=1.0), deltas), [0.45, 0.6], rtol=1e-6)


def test_geometric_median_by_hand() -> None:
    """On a line it is the median; of a right-angled cross it is the crossing, wherever the mean is."""
    assert _aggregate(_rule("geometric_median"), _columns(0, 1, 10))[0] == pytest.approx(1.0, abs=1e-4)
    cross = np.array([[-1, 0], [9, 0], [0, -2], [0, 4]], dtype=np.float32)
    np.testing.assert_allclose(_aggregate(_rule("geometric_median"), cross), [0, 0], atol=1e-4)


def test_geometric_median_weighs_by_examples() -> None:
    """More than half of the weight on one client holds the median there."""
    result = _aggregate(_rule("geometric_median"), _columns(0, 1, 10), np.array([1.0, 1.0, 3.0]))
    assert result[0] == pytest.approx(10, abs=1e-4)


def test_krum_by_hand() -> None:
    """K = 5, f = 1: the score adds 2 squared distances, which gives 5, 2, 5, 13 and 46^2 + 48^2."""
    deltas = _columns(0, 1.0, 2, 4, 50).astype(np.float64)
    np.testing.assert_array_equal(krum_order(deltas @ deltas.T, 1, np.arange(5)), [1, 0, 2, 3, 4])
    assert _aggregate(_rule("krum", assumed_malicious=1), _columns(0, 1.5, 2, 2.6, 50))[0] == 2


def test_krum_takes_the_lowest_id_of_equals() -> None:
    """With one neighbour to count, two that are each other's nearest have the same score."""
    deltas = _columns(0, 5, 6, 20).astype(np.float64)
    for ids, expected in (([0, 1, 2, 3], 1), ([0, 2, 1, 3], 2)):
        assert krum_order(deltas @ deltas.T, 1, np.array(ids))[0] == expected


def test_multi_krum_by_hand() -> None:
    """The best K - f = 4 of 5: all but the far one."""
    assert _aggregate(_rule("multi_krum", assumed_malicious=1), _columns(0, 1, 2, 3, 50))[0] == 1.5


def test_bulyan_by_hand() -> None:
    """K = 7, f = 1: 5 chosen (0 to 4, not the far two); of each column the 3 closest to the median 2: 1, 2, 3."""
    rule = _rule("bulyan", assumed_malicious=1)
    assert isinstance(rule, Bulyan)
    assert _aggregate(rule, _columns(0, 1, 2, 3, 4, 60, -90))[0] == 2
    # uneven: chosen 0, 1, 2, 5, 9 with median 2; closest three are 0, 1, 2 (distance 2) and not 5 (distance 3)
    assert _aggregate(rule, _columns(0, 1, 2, 5, 9, 600, -900))[0] == 1


@pytest.mark.parametrize("seed", range(20))
def test_bulyan_chooses_as_krum_would_one_after_the_other(seed: int) -> None:
    """Of points on a small grid, with many clones and equal distances."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 40))
    malicious = int(rng.integers(0, (count - 3) // 4 + 1))
    points = rng.integers(0, 4, size=(count, 2)).astype(np.float64)
    inner, ids, left, expected = points @ points.T, rng.permutation(count), list(range(count)), []
    while len(expected) < count - 2 * malicious:
        expected.append(left.pop(int(krum_order(inner[np.ix_(left, left)], malicious, ids[left])[0])))
    assert bulyan_choice(inner, malicious, ids).tolist() == expected


def test_foolsgold_by_hand() -> None:
    """Two sybils that say the same, two honest ones at right angles: the sybils lose their say, the honest keep it."""
    deltas = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=np.float32)
    np.testing.assert_allclose(_aggregate(_rule("foolsgold"), deltas), [0, 0.5, 0.5], atol=1e-12)


def test_foolsgold_on_clones_alone() -> None:
    """Every alpha is 0, and so is the largest, which becomes 1: all have the same say."""
    np.testing.assert_allclose(_aggregate(_rule("foolsgold"), np.ones((4, 3), dtype=np.float32)), 1.0)


def test_foolsgold_pardons_an_honest_client_near_sybils() -> None:
    """By the paper's lines: v = (1, 1, 0.6, 0), so that the third's cosines to the sybils become 0.6 * 0.6 / 1 = 0.36.

    Its alpha is 0.64, and ln(0.64 / 0.36) + 0.5 > 1: a full say. Unpardoned it would have ln(0.4 / 0.6) + 0.5 = 0.09.
    """
    deltas = np.array([[1, 0, 0], [1, 0, 0], [0.6, 0.8, 0], [0, 0, 1]], dtype=np.float32)
    np.testing.assert_allclose(_aggregate(_rule("foolsgold"), deltas), [0.3, 0.4, 0.5], rtol=1e-6)


def test_foolsgold_remembers() -> None:
    """Two clients that differ in the second round alone are still similar over both; so they are after a restore."""
    first = np.array([[5, 0, 0], [5, 0, 0], [0, 1, 0]], dtype=np.float32)
    second = np.array([[0.0, 0, 1], [0, 1, 0], [0, 1, 0]], dtype=np.float32)
    rule = _rule("foolsgold")
    _aggregate(rule, first)
    restored = _rule("foolsgold")
    restored.restore({name: array.copy() for name, array in rule.state().items()})
    remembered = _aggregate(rule, second)
    np.testing.assert_array_equal(_aggregate(restored, second), remembered)
    assert np.abs(_aggregate(_rule("foolsgold"), second) - remembered).max() > 0.1
    assert isinstance(rule, FoolsGold)
    np.testing.assert_array_equal(rule.state()["foolsgold_history"][:3], first + second)


def test_fltrust_by_hand() -> None:
    """Server (3, 4) of norm 5: the client along it counts whole and is scaled to 5, the one against it not at all."""
    deltas = np.array([[3, 4], [0.6, 0.8], [-30, -40]], dtype=np.float32)
    np.testing.assert_allclose(_aggregate(_rule("fltrust"), deltas), [3, 4], rtol=1e-6)
    # two clients at cosines 1 and 0.6: (1 * (3, 4) + 0.6 * (5, 0)) / 1.6
    deltas = np.array([[3, 4], [6, 8], [1, 0]], dtype=np.float32)
    np.testing.assert_allclose(_aggregate(_rule("fltrust"), deltas), [6 / 1.6, 4 / 1.6], rtol=1e-6)


def test_flame_by_hand() -> None:
    """Three of four point the same way, with norms 1, 2 and 3; the fourth points back with norm 2.

    The median norm of all is 2: the cluster's deltas become (1, 2, 2), their mean is 5 / 3.
    """
    rule = _rule("flame", flame_noise=0.001)
    result = _aggregate(rule, np.array([[1, 0], [2, 0], [3, 0], [-2, 0]], dtype=np.float32))
    np.testing.assert_allclose(result, [5 / 3, 0], rtol=1e-6)
    assert rule.noise_std == pytest.approx(0.002)


def test_centred_clipping_by_hand() -> None:
    """Radius 1: from 0 the updates 0.5 and -9 move the centre by (0.5 - 1) / 2, then by (0.75 - 1) / 2 once more."""
    rule = _rule("centred_clipping", clip_iterations=2)
    assert _aggregate(rule, _columns(0.5, -9))[0] == pytest.approx(-0.25 + (0.75 - 1) / 2)
    # the next round begins at -0.375: 0.625 is within the radius, -1.375 just so
    restored = _rule("centred_clipping", clip_iterations=1)
    restored.restore({name: array.copy() for name, array in rule.state().items()})
    assert _aggregate(restored, _columns(0.25, -9))[0] == pytest.approx(-0.375 + (0.625 - 1) / 2)


def test_dnc_by_hand() -> None:
    """Updates differ along the first coordinate most: of 0, 1, 2 and 30 the last goes, with f = 1."""
    deltas = np.array([[0, 0], [1, 0.1], [2, -0.1], [30, 0]], dtype=np.float32)
    np.testing.assert_allclose(_aggregate(_rule("dnc", assumed_malicious=1), deltas), [1, 0], atol=1e-7)


def test_dnc_looks_at_samples_of_the_coordinates() -> None:
    """With one coordinate a sample, another client may be the outlier in each; the draw is the round's."""
    deltas = np.eye(5, 40, dtype=np.float32)
    rule = _rule("dnc", assumed_malicious=1, dnc_coordinates=1, dnc_iterations=200)
    assert np.count_nonzero(_aggregate(rule, deltas)) == 0  # each was the outlier in some sample
    few = _rule("dnc", assumed_malicious=1, dnc_coordinates=1, dnc_iterations=1)
    assert np.count_nonzero(_aggregate(few, deltas)) == 4


def test_dnc_of_clones_goes_by_id() -> None:
    """Equal updates have equal scores: the highest id of them goes, in whatever order they come."""
    rng = np.random.default_rng(3)
    deltas = rng.standard_normal((10, 40)).astype(np.float32)
    deltas[7:] = 3 * deltas[7]
    expected = _aggregate(_rule("dnc", assumed_malicious=1), deltas)
    np.testing.assert_allclose(expected, deltas[:9].mean(axis=0), rtol=1e-5, atol=1e-7)
    order = rng.permutation(10)
    shuffled = _aggregate(_rule("dnc", assumed_malicious=1), deltas[order], clients=order)
    np.testing.assert_allclose(shuffled, expected, rtol=1e-6, atol=1e-9)


def test_freqfed_by_hand() -> None:
    """Of five, three differ in high frequencies alone: by their low ones they are the largest cluster."""
    wave, jitter = np.cos(np.pi / 8 * (np.arange(8) + 0.5)), np.tile([1.0, -1.0], 4)
    deltas = np.stack([wave, wave + jitter, wave - jitter, -wave, np.ones(8)]).astype(np.float32)
    np.testing.assert_allclose(_aggregate(_rule("freqfed", freqfed_share=0.25), deltas), wave, atol=1e-6)


def test_mixing_by_hand() -> None:
    """K = 4, f = 1: each becomes the mean of its three nearest, so that 0, 1, 2, 9 become 1, 1, 1, 4."""
    assert _aggregate(_rule("median mixed", assumed_malicious=1), _columns(0, 1, 2, 9))[0] == 1
    assert _aggregate(_rule("fedavg mixed", assumed_malicious=1), _columns(0, 1, 2, 9))[0] == 1.75


def test_outlier_check_by_hand() -> None:
    """Prompts on a global vector of ones: one has another mean, one the same mean and a wider spread; both go."""
    base = np.tile([1.0, -1.0], P // 2)
    scales = np.array([1.0, 1.1, 0.9, 1.05, 0.95, 5.0])
    deltas = (scales[:, None] * base).astype(np.float32)
    np.testing.assert_allclose(_aggregate(_rule("outlier_check"), deltas), base, rtol=1e-5)  # the spread
    shifted = deltas[:5] + np.array([0.01, -0.01, 0, 0.005, 3.0], dtype=np.float32)[:, None]
    kept = _aggregate(_rule("outlier_check"), shifted)
    np.testing.assert_allclose(kept, shifted[:4].mean(axis=0), rtol=1e-5)  # the mean


def test_inner_products_are_those_of_float64() -> None:
    rows = np.random.default_rng(0).standard_normal((600, 1000)).astype(np.float32)
    total = np.ones((600, 600))
    add_inner_products(total, rows)
    expected = 1 + rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.testing.assert_allclose(np.tril(total), np.tril(expected), rtol=1e-12, atol=1e-12)
    rule = _rule("krum")
    assert isinstance(rule, PairwiseRule)
    _aggregate(rule, rows)
    np.testing.assert_allclose(rule.inner, expected - 1, rtol=1e-12, atol=1e-12)


def test_inner_products_have_the_same_bits_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((600, 1000)).astype(np.float32)
    totals = []
    for cores in (1, 2, 7):
        monkeypatch.setattr(pairwise, "_cores", lambda cores=cores: cores)
        totals.append(np.zeros((600, 600)))
        add_inner_products(totals[-1], rows)
    np.testing.assert_array_equal(totals[1], totals[0])
    np.testing.assert_array_equal(totals[2], totals[0])


def test_an_unknown_rule_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'mode': choose one of bulyan, .*trimmed_mean"):
        FederationConfig(aggregator="mode")


def test_too_large_an_f_names_the_largest_that_would_do() -> None:
    with pytest.raises(SettingsError, match="assume at most 3"):
        FederationConfig(aggregator="krum", assumed_malicious=4)
    with pytest.raises(SettingsError, match="have at least 3"):
        FederationConfig(aggregator="krum", assumed_malicious=1, clients=2)
    with pytest.raises(SettingsError, match="there are 3"):  # it is the round's clients that count
        FederationConfig(aggregator="krum", fraction=0.3)
