"""What the attacks make of numbers, by hand."""

import numpy as np
import pytest
from scipy import special

from fedprompt_mpi.audit.attacks import (
    as_counts,
    calibrated,
    confidence,
    floor_of,
    label_shares,
    rows_that_moved,
    unit_rows,
    within_classes,
)
from fedprompt_mpi.audit.intervals import auc_value


def test_rows_that_moved() -> None:
    rows = np.zeros((50, 4), dtype=np.float32)
    rows[[3, 17]] = 1e-8
    np.testing.assert_array_equal(np.flatnonzero(rows_that_moved(rows)), [3, 17])
    noisy = np.random.default_rng(0).normal(0, 1e-9, rows.shape) + rows
    np.testing.assert_array_equal(np.flatnonzero(rows_that_moved(noisy.astype(np.float32))), [3, 17])
    drowned = np.random.default_rng(0).normal(0, 1e-6, rows.shape) + rows
    assert not rows_that_moved(drowned.astype(np.float32))[[3, 17]].any()


def test_calibrated_scores_are_deviations_from_the_shadows() -> None:
    shadows = np.array([[1.0, 3.0], [10.0, 14.0], [5.0, 5.0]])
    floor = floor_of(shadows)
    assert floor == pytest.approx(np.std([1, 3], ddof=1) / 2)
    found = calibrated(np.array([[2.0], [16.0], [6.0]]), shadows, floor)
    assert found[0, 0] == 0
    assert found[1, 0] == pytest.approx(4 / np.std([10, 14], ddof=1))
    assert found[2, 0] == pytest.approx(1 / floor)  # shadows without spread


def test_scores_within_classes_do_not_know_the_label() -> None:
    """A score that is the label, and nothing else, tells members of one class from others of two; within it nothing."""
    rng = np.random.default_rng(0)
    labels = np.ones(20, dtype=np.int64), rng.integers(2, size=400)
    scores = tuple(10.0 * own + rng.normal(size=len(own)) for own in labels)
    assert auc_value(*scores) > 0.7
    inside, outside = within_classes(scores[0], scores[1], labels)
    assert len(outside) == 400 and 0.35 < auc_value(inside, outside) < 0.65
    few = within_classes(scores[0], scores[1][:4], (labels[0], labels[1][:4]))
    assert len(few[0]) == len(few[1]) == 0


def test_label_shares_of_a_linear_relation() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), 40)
    truth = rng.dirichlet(np.ones(3), 10)
    mixing = rng.standard_normal((3, 3))
    told = label_shares(truth @ mixing, shares @ mixing, shares)
    assert np.abs(told - truth).max() < 0.05
    np.testing.assert_allclose(told.sum(axis=1), 1)


def test_label_shares_of_noise_are_those_of_the_shadows() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(2), 40)
    told = label_shares(rng.standard_normal((50, 2)), rng.standard_normal((40, 2)), shares)
    assert np.abs(told - shares.mean(axis=0)).mean() < 0.06


def test_as_counts() -> None:
    assert as_counts(np.array([0.5, 0.3, 0.2]), 7).tolist() == [4, 2, 1]
    assert as_counts(np.array([0.4, 0.6]), 1).tolist() == [0, 1]


def test_confidence_is_the_logit_of_the_true_class() -> None:
    logits = np.random.default_rng(0).standard_normal((6, 3))
    labels = np.array([0, 1, 2, 0, 1, 2])
    p = special.softmax(logits, axis=1)[np.arange(6), labels]
    np.testing.assert_allclose(confidence(logits, labels), np.log(p / (1 - p)), rtol=1e-6)


def test_unit_rows_leave_zeros() -> None:
    np.testing.assert_allclose(unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]])), [[0.6, 0.8], [0.0, 0.0]])
