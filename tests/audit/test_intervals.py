"""Figures of an attack against counts by hand, scikit-learn and SciPy."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedprompt_mpi.audit.intervals import above, allowed, auc_interval, auc_value, mean, proportion


def test_auc_is_scikit_learn_s() -> None:
    rng = np.random.default_rng(0)
    for inside, outside in (
        (rng.normal(1, 1, 30), rng.normal(0, 1, 50)),
        (rng.integers(4, size=20), rng.integers(3, size=9)),
    ):
        truth = np.repeat([1, 0], [len(inside), len(outside)])
        assert auc_value(inside, outside) == pytest.approx(roc_auc_score(truth, np.concatenate([inside, outside])))


@pytest.mark.parametrize(("apart", "n", "m"), [(0.0, 20, 100), (1.0, 20, 100), (1.5, 50, 50)])
def test_the_interval_of_an_auc_holds_it_in_95_of_100(apart: float, n: int, m: int) -> None:
    rng, true = np.random.default_rng(1), float(stats.norm.cdf(apart / np.sqrt(2)))
    held = [
        auc_interval(auc_value(rng.normal(apart, 1, n), rng.normal(0, 1, m)), n, m).holds(true) for _ in range(1000)
    ]
    assert 0.92 < np.mean(held) <= 0.99


def test_an_auc_of_one_has_an_interval() -> None:
    figure = auc_interval(1.0, 5, 10)
    assert figure.value == figure.high == 1 and 0.9 < figure.low < 1


def test_the_threshold_of_a_false_positive_rate() -> None:
    """Scores of which none was in are above it as often as it says, also where there are few."""
    assert [allowed(0.01, m) for m in (98, 99, 100, 199, 1000)] == [0, 1, 1, 2, 10]
    assert allowed(0.001, 998) == 0 and allowed(0.001, 999) == 1
    assert above(np.array([200.0, 99.5, 98.5, 0.0]), np.arange(100.0), 1) == 2
    assert above(np.ones(50), np.ones(200), 1) == 0  # ties are not above
    rng = np.random.default_rng(0)
    false = [
        above(rng.normal(size=1), rng.normal(size=m), allowed(0.02, m)) for m in (60, 100, 150) for _ in range(3000)
    ]
    assert 0.013 < np.mean(false) < 0.022


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (10, 10), (1, 1), (250, 500)])
def test_the_exact_interval_is_scipy_s(hits: int, count: int) -> None:
    theirs = stats.binomtest(hits, count).proportion_ci(0.95, method="exact")
    ours = proportion(hits, count)
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=1e-9), pytest.approx(theirs.high, abs=1e-9))


def test_a_mean_without_spread_has_an_interval() -> None:
    assert mean(np.array([0.4, 0.6])).value == 0.5
    always = mean(np.ones(10))
    assert (always.value, always.high) == (1, 1) and always.low == pytest.approx(0.025 ** (1 / 10))
    assert mean(np.zeros(10)).high == pytest.approx(1 - 0.025 ** (1 / 10))
