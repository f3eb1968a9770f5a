"""The kinds of texts of opposite labels: found together, counted in both, and which of them are odd."""

import numpy as np
import pytest

from fedprompt_mpi.rules.example_groups import ClientGroups, global_groups, unit
from fedprompt_mpi.rules.example_kinds import KINDS, NONE, count, first_directions, judge, kinds_of, sums_of

AXES = np.eye(4, 6, dtype=np.float32)
"""Four axes of six frequencies."""


def directions_of(*rows: int) -> np.ndarray:
    """Return kinds along some of the frequencies; the others are nobody's."""
    directions = np.zeros((KINDS, 6), dtype=np.float32)
    directions[: len(rows)] = np.eye(6, dtype=np.float32)[list(rows)]
    return directions


def test_the_kind_of_an_example_is_that_of_the_nearest_direction() -> None:
    coordinates = np.array([[5, 1, 0, 0], [-1, -2, -0.5, -9], [0, 0, 0, 0], [0, 0, -3, 0]], dtype=np.float32)
    kinds = kinds_of(coordinates, AXES, directions_of(0, 2))
    assert kinds.tolist() == [0, 1, NONE, 0]  # -1 and -0.5 beside the two; nothing; 0 beside -3
    assert count(kinds).tolist() == [2, 1] + [0] * (KINDS - 2)


def test_sums_are_of_directions() -> None:
    coordinates = np.array([[3, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 8]], dtype=np.float32)
    sums = sums_of(coordinates, AXES, np.array([0, 0, NONE, 5]))
    assert (sums == np.rint(sums)).all()
    expected = np.zeros((KINDS, 6))
    expected[0], expected[5, 3] = unit(np.array([[1, 1, 0, 0, 0, 0]])), 1
    np.testing.assert_allclose(unit(sums), expected, atol=1e-6)


def test_the_first_directions_are_those_of_the_largest_groups() -> None:
    means = unit(np.random.default_rng(0).normal(size=(40, 600)))  # no two are near each other
    found = ClientGroups(means=means, examples=np.arange(1, 41), clients=np.zeros(40, dtype=np.int64))
    np.testing.assert_allclose(first_directions(global_groups(found, 1, 0.4)), means[:-17:-1], atol=1e-6)
    few = ClientGroups(means=means[:2], examples=np.array([9, 4]), clients=np.zeros(2, dtype=np.int64))
    np.testing.assert_allclose(first_directions(global_groups(few, 1, 0.4))[:3], [*means[:2], np.zeros(600)], atol=1e-6)


def test_odd_kinds_by_hand() -> None:
    """Three clients with 100 examples of a label; of the 200 of the opposite one, few are of the second kind."""
    own, opposite = np.array([[42, 7, 0], [30, 4, 0], [13, 4, 0]]), np.array([196, 3, 1])
    common, rare, nobodys = judge(own, opposite, 0.35)
    assert (common.examples, common.clients, common.is_odd) == (85, 3, False)
    assert common.counterpart == pytest.approx(196 / 200 / 0.85)
    assert (rare.examples, rare.clients, rare.is_odd) == (15, 3, True)
    assert rare.counterpart == pytest.approx(3 / 200 / 0.15)
    assert not nobodys.is_odd
    assert not judge(own, opposite, 0.05)[1].is_odd
    of_one_client, of_the_label = [[40, 15, 0], [50, 1, 0], [9, 1, 0]], [[30, 12, 0], [30, 12, 0], [10, 6, 0]]
    assert not judge(np.array(of_one_client), opposite, 0.35)[1].is_odd  # one has nearly all of it
    assert not judge(np.array(of_the_label), opposite, 0.35)[1].is_odd  # it is a main part of the label


def test_poison_of_one_label_is_found_among_kinds_that_both_have() -> None:
    """Four kinds of texts in both labels, whose signs are turned; poison in label 1 alone; noise on all axes."""
    rng = np.random.default_rng(0)
    axes = np.eye(30, dtype=np.float32)
    kinds = rng.integers(0, 4, 1200)
    labels = rng.integers(0, 2, 1200)
    kinds[(labels == 1) & (rng.random(1200) < 0.1)] = 4
    points = rng.normal(size=(1200, 30)).astype(np.float32)
    points[np.arange(1200), kinds] += 6
    points[labels == 0] *= -1
    directions = np.zeros((2, KINDS, 30), dtype=np.float32)
    for label in (0, 1):
        first = [np.flatnonzero((labels == label) & (kinds == kind))[0] for kind in range(4 + label)]
        directions[label, : len(first)] = unit(points[first])
        for _ in range(5):
            nearest = kinds_of(points[labels == label], axes, directions[label])
            directions[label] = unit(sums_of(points[labels == label], axes, nearest))
    own = kinds_of(points[labels == 1], axes, directions[1])
    turned = count(kinds_of(-points[labels == 0], axes, directions[1]))
    found = judge(np.stack([count(own[client::4]) for client in range(4)]), turned, 0.35)
    is_odd = np.array([kind.is_odd for kind in found])
    assert (is_odd[own] == (kinds[labels == 1] == 4)).mean() > 0.97
