"""The groups of examples, and which of them are odd: by hand, and against the definitions."""

import math

import numpy as np
import pytest

from fedprompt_mpi.rules.example_groups import (
    EXAMPLES_PER_AXIS,
    MOST_COMPARED,
    PARTINGS,
    WHOLE,
    ClientGroups,
    Group,
    centroids,
    global_groups,
    label_cosines,
    local_groups,
    low_frequencies,
    nearer_to_odd,
    opposite_labels,
    sums_in_two,
    unit,
    whiten,
    whole_sum,
)


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
    gradients = np.zeros((3, 4, 6), dtype=np.float32)
    gradients[1, 2, 3] = np.nan
    gradients[2] = 3e38  # their transform overflows
    with np.errstate(over="ignore", invalid="ignore"):
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


def groups_of(means: np.ndarray, counts: list[int], clients: list[int]) -> ClientGroups:
    return ClientGroups(means=means, examples=np.array(counts), clients=np.array(clients))


def sort(means: np.ndarray, counts: list[int], clients: list[int], cosine: float = 0.25) -> list[Group]:
    """Sort the groups of clients 0 to the largest one named."""
    return global_groups(groups_of(means, counts, clients), max(clients) + 1, cosine)


def test_odd_groups_by_hand() -> None:
    """Two clients with 50 clean examples each in two groups, and three poisoned ones each at 100 degrees."""
    means, counts, clients = directions(0, 20, 100, 2, 22, 101), [40, 10, 3, 40, 10, 3], [0, 0, 0, 1, 1, 1]
    largest, odd = sort(means, counts, clients)
    assert (largest.examples, largest.clients, largest.is_odd) == (100, 2, False) and largest.cosine == pytest.approx(1)
    assert (odd.examples, odd.clients, odd.is_odd, sorted(odd.members)) == (6, 2, True, [2, 5])
    np.testing.assert_allclose(odd.mean, directions(100.5)[0], atol=1e-6)
    towards = np.average(means[[0, 1, 3, 4]], axis=0, weights=[40, 10, 40, 10])
    expected = math.cos(math.radians(100.5) - math.atan2(towards[1], towards[0]))
    assert odd.cosine == pytest.approx(expected, abs=1e-3)
    assert not sort(means, counts, clients, expected - 0.01)[1].is_odd  # not far enough


def test_what_is_not_spread_is_kept_and_so_is_a_main_part_of_the_label() -> None:
    def odd(means: np.ndarray, counts: list[int], clients: list[int]) -> list[bool]:
        return [group.is_odd for group in sort(means, counts, clients)]

    assert odd(directions(0, 1, 2, 100), [9, 9, 9, 2], [0, 1, 2, 2]) == [False, False]  # one of three clients has it
    assert odd(directions(0, 100, 1, 101), [20, 9, 20, 1], [0, 0, 1, 1]) == [False, False]  # one has nearly all of it
    assert odd(directions(0, 100, 1, 101), [7, 3, 7, 3], [0, 0, 1, 1]) == [False, False]  # 30 % of the label
    assert odd(directions(0, 100, 1, 101), [8, 3, 8, 3], [0, 0, 1, 1]) == [False, True]
    assert odd(directions(0, 100, 1, 101), [8, 3, 8, 3], [0, 0, 1, 5]) == [False, False]  # others lack the label


def test_a_client_that_poison_dominates_is_judged_by_the_others() -> None:
    """Its largest group is the poison; beside the groups of others it is the odd one."""
    means, clients = directions(100, 0, 1, 100, 2, 100), [0, 0, 1, 1, 2, 2]
    _, odd = sort(means, [12, 3, 50, 8, 50, 8], clients)
    assert odd.is_odd and sorted(odd.members) == [0, 3, 5]


def test_a_group_without_a_direction_is_neither_odd_nor_what_others_are_compared_with() -> None:
    means = directions(0, 0, 10, 0)
    means[[1, 3]] = 0
    (only,) = sort(means, [5, 60, 5, 60], [0, 0, 1, 1])
    assert not only.is_odd and sorted(only.members) == [0, 2] and only.cosine == pytest.approx(1)
    assert sort(np.zeros((2, 2), dtype=np.float32), [5, 5], [0, 1]) == []


def test_labels_that_pull_in_opposite_directions() -> None:
    sums = np.array([[3.0, 0.2], [-2.0, 0.1], [0.1, 1.0], [0.0, 0.0], [-5.0, -0.5]])
    assert opposite_labels(label_cosines(sums)) == {0: [1, 4], 1: [0], 2: [], 3: [], 4: [0]}


def test_sums_do_not_depend_on_the_order() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(1000, 7)))
    assert (whole_sum(rows) == whole_sum(rows[::-1])).all()
    assert (whole_sum(rows) == whole_sum(rows[:300]) + whole_sum(rows[300:])).all()
    np.testing.assert_allclose(whole_sum(rows) / WHOLE, rows.sum(axis=0), atol=1e-3)


def test_whitening_gives_every_axis_a_variance_of_1_within_labels() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    spread = np.array([10, 3, 1, *[0.01] * 97])
    features = rng.normal(size=(600, 100)) * spread + 100 * labels[:, None]
    coordinates, axes = whiten(features.astype(np.float32), labels)
    assert axes.shape == (600 // EXAMPLES_PER_AXIS, 100)
    np.testing.assert_allclose(axes @ axes.T, np.eye(75), atol=1e-5)
    np.testing.assert_allclose(coordinates.T @ coordinates / 600, np.eye(75), atol=1e-4)
    for label in (0, 1):
        np.testing.assert_allclose(coordinates[labels == label].mean(axis=0), 0, atol=1e-4)


def test_whitening_of_little() -> None:
    """Examples without a direction stay so, and tell nothing of the mean; one example of a label is its mean."""
    features = directions(0, 90, 0, 30)
    features[2] = 0
    coordinates, axes = whiten(features, np.array([0, 0, 0, 1]))
    assert axes.shape == (1, 2) and coordinates.shape == (4, 1)
    assert coordinates[0] == -coordinates[1] != 0 and not coordinates[2:].any()
    coordinates, axes = whiten(np.zeros((2, 5), dtype=np.float32), np.array([0, 1]))
    assert coordinates.shape == (2, 0) and axes.shape == (0, 5)
    assert not (centroids(coordinates, local_groups(coordinates, 8)) @ axes).any()


def test_a_label_is_parted_where_the_odd_ones_end() -> None:
    """Two clouds on two clients, of which a part of the smaller one was found, and two examples of the other."""
    rng = np.random.default_rng(0)
    points, axes = rng.normal(size=(200, 10)).astype(np.float32), np.eye(10, 15, dtype=np.float32)
    is_poison = np.arange(200) % 7 == 0
    points[is_poison, 0] += 8
    is_odd = is_poison & (np.arange(200) < 60)
    is_odd[[50, 51]] = True
    clients = (slice(0, 120), slice(120, 200))  # nothing was found on the second one
    for _ in range(PARTINGS):
        sums = sum((sums_in_two(points[own], axes, is_odd[own]) for own in clients), np.zeros((2, 16)))
        assert sums[:, -1].tolist() == [(~is_odd).sum(), is_odd.sum()]
        is_odd = np.concatenate([nearer_to_odd(points[own], axes, sums) for own in clients])
    assert is_odd.tolist() == is_poison.tolist()
    for nothing in (np.zeros(200, dtype=bool), np.ones(200, dtype=bool)):
        assert not nearer_to_odd(points, axes, sums_in_two(points, axes, nothing)).any()


def test_of_very_many_groups_some_are_compared_and_the_others_join_them() -> None:
    clients = np.arange(MOST_COMPARED + 500)
    angles = np.where(clients % 3 == 0, 100, 0) + np.random.default_rng(0).normal(0, 3, len(clients))
    found = groups_of(directions(*angles), [1] * len(clients), clients.tolist())
    largest, odd = global_groups(found, len(clients), 0.25)
    assert sorted([*largest.members, *odd.members]) == clients.tolist()
    assert (odd.members % 3 == 0).all()


def test_groups_do_not_depend_on_the_order_of_the_clients() -> None:
    rng = np.random.default_rng(1)
    means = directions(*rng.uniform(0, 360, 40))
    counts, clients = rng.integers(1, 20, 40), np.repeat(np.arange(10), 4)
    order = rng.permutation(40)
    ours, theirs = (
        sorted((group.examples, group.clients, group.is_odd, round(group.cosine, 5)) for group in found)
        for found in (
            sort(means, counts.tolist(), clients.tolist()),
            sort(means[order], counts[order].tolist(), clients[order].tolist()),
        )
    )
    assert ours == theirs
