"""A lower bound of epsilon: below the truth in nearly all tries, and above what is stated of a mechanism that lies."""

import numpy as np
import pytest

from fedprompt_mpi.audit.epsilon import lower_bound

DELTA = 1e-5


def _scores(apart: float, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(apart, 1, count), rng.normal(0, 1, count)


@pytest.mark.parametrize(("apart", "epsilon"), [(0.0, 0.0), (0.5, 1.99), (1.0, 4.377)])
def test_the_bound_stays_below_the_truth(apart: float, epsilon: float) -> None:
    """Of the Gaussian mechanism, whose epsilon at that delta is known; the estimate is near it."""
    found = [lower_bound(*_scores(apart, 500, seed), DELTA) for seed in range(60)]
    assert np.mean([one.bound <= epsilon for one in found]) >= 0.95
    assert np.median([one.estimate for one in found]) == pytest.approx(epsilon, abs=0.35)


def test_scores_that_are_apart_give_the_most_that_so_many_can_show() -> None:
    found = lower_bound(np.ones(500), np.zeros(500), DELTA)
    assert found.bound == pytest.approx(found.most) and found.most == pytest.approx(4.2, abs=0.1)
    assert found.estimate == float("inf")


def test_scores_of_the_wrong_order_say_nothing() -> None:
    assert lower_bound(*_scores(-3.0, 500, 0), DELTA).estimate == 0
