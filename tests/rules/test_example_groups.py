"""The groups of examples, and which of them are taken for poison: by hand, and against the definitions."""

import math

import numpy as np
import pytest

from fedprompt_mpi.rules.example_groups import MOST_COMPARED, centroids, global_groups, local_groups, low_frequencies

COSINE = 0.25


def test_low_frequencies_are_those_of_the_definition() -> None:
    """The orthonormal transform of type II, by its sums: of the 2 x 3 lowest frequencies of 4 x 6."""
    tokens, width = 4, 6
    gradient = np.random.default_rng(0).normal(size=(tokens, width))

    def wave(frequency: int, count: int) -> np.ndarray:
        scale = math.sqrt((1 if frequency == 0 else 2) / count)
        return scale * np.cos(math.pi * (2 * np.arange(count) + 1) * frequency / (2 * count))

    expected = np.array([[wave(i, tokens) @ gradient @ wave(j, width) for j in range(3)] for i in range(2)]).ravel()
    (found,) = low_frequencies(gradient[None].astype(np.float32), 0.5)
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-6)


def test_a_gradient_of_zero_or_of_nan_has_no_direction() -> None:
    gradients = np.zeros((2, 4, 6), dtype=np.float32)
    gradients[1, 2, 3] = np.nan
    assert not low_frequencies(gradients, 0.5).any()


def directions(*angles_deg: float) -> np.ndarray:
    """Return unit vectors in the plane `[n, 2]` float32."""
    angles = np.deg2rad(angles_deg)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_local_groups_by_hand() -> None:
    """Three bundles of directions."""
    groups = local_groups(directions(0, 2, 4, 90, 92, 180), 3)
    assert groups[0] == groups[1] == groups[2] and groups[3] == groups[4]
    assert len({groups[0], groups[3], groups[5]}) == 3
    assert local_groups(directions(0, 90), 8).tolist() in ([0, 1], [1, 0])  # no more groups than examples
    assert local_groups(directions(7), 8).tolist() == [0]
    np.testing.assert_allclose(centroids(directions(0, 90, 200), np.array([0, 0, 1])), directions(45, 200), atol=1e-6)


def test_of_very_many_examples_some_are_compared_and_the_others_join_them() -> None:
    rng = np.random.default_rng(0)
    is_poison = rng.random(2 * MOST_COMPARED + 1) < 0.02
    features = directions(*np.where(is_poison, 120, 0) + rng.normal(0, 5, len(is_poison)))
    groups = local_groups(features, 6)
    assert not {*groups[is_poison]} & {*groups[~is_poison]}


def test_odd_groups_by_hand() -> None:
    """Two clients with 50 clean examples each in two groups, and three poisoned ones each at 100 degrees.

    The largest group's mean is at (40 * 0 + 10 * 20) weighted, that of the poison's at 100: their cosine is below 0.25.
    """
    means, counts = directions(0, 20, 100, 2, 22, 101), np.array([40, 10, 3, 40, 10, 3])
    clients = np.array([0, 0, 0, 1, 1, 1])
    largest, odd = global_groups(means, counts, clients, COSINE)
    assert (largest.examples, largest.clients, largest.is_odd) == (100, 2, False) and largest.cosine == pytest.approx(1)
    assert (odd.examples, odd.clients, odd.is_odd, sorted(odd.members)) == (6, 2, True, [2, 5])
    towards = np.average(means[[0, 1, 3, 4]], axis=0, weights=[40, 10, 40, 10])
    expected = math.cos(math.radians(100.5) - math.atan2(towards[1], towards[0]))
    assert odd.cosine == pytest.approx(expected, abs=1e-3)
    assert not global_groups(means, counts, clients, expected - 0.01)[1].is_odd  # not far enough


def test_what_only_few_clients_have_is_kept_and_so_is_a_main_part_of_the_label() -> None:
    lone = global_groups(directions(0, 1, 2, 100), np.array([9, 9, 9, 2]), np.array([0, 1, 2, 2]), COSINE)
    assert [group.is_odd for group in lone] == [False, False]
    halves = global_groups(directions(0, 100, 1, 101), np.array([6, 4, 6, 4]), np.array([0, 0, 1, 1]), COSINE)
    assert [group.is_odd for group in halves] == [False, False]
    seldom = global_groups(directions(0, 100, 1, 101), np.array([7, 4, 7, 4]), np.array([0, 0, 1, 1]), COSINE)
    assert [group.is_odd for group in seldom] == [False, True]


def test_a_client_that_poison_dominates_is_judged_by_the_others() -> None:
    """Its largest group is the poison; beside the groups of three clean clients it is the odd one."""
    means, clients = directions(100, 0, 1, 100, 2, 100), np.array([0, 0, 1, 1, 2, 2])
    _, odd = global_groups(means, np.array([20, 5, 30, 2, 30, 2]), clients, COSINE)
    assert odd.is_odd and sorted(odd.members) == [0, 3, 5]


def test_groups_do_not_depend_on_the_order_of_the_clients() -> None:
    rng = np.random.default_rng(1)
    means = directions(*rng.uniform(0, 360, 40))
    counts, clients = rng.integers(1, 20, 40), np.repeat(np.arange(10), 4)
    order = rng.permutation(40)
    ours, theirs = (
        sorted((group.examples, group.clients, group.is_odd, round(group.cosine, 5)) for group in found)
        for found in (
            global_groups(means, counts, clients, COSINE),
            global_groups(means[order], counts[order], clients[order], COSINE),
        )
    )
    assert ours == theirs
