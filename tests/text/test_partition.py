"""Every example has one owner, nobody has none, and each kind is skewed as it says."""

import numpy as np
import pytest

from fedprompt_mpi.config import FederationConfig, SettingsError
from fedprompt_mpi.text.partition import format_table, partition

KINDS = ("iid", "quantity", "label", "label_shares", "natural")


def _split(kind: str, count: int = 600, clients: int = 10, alpha: float = 1.0, seed: int = 0, classes: int = 3):
    rng = np.random.default_rng(1)
    labels = rng.integers(classes, size=count)
    users = [f"u{i}" for i in rng.integers(40, size=count)]
    config = FederationConfig(clients=clients, partition=kind, alpha=alpha)  # pyright: ignore
    return partition(config, labels, users, seed), labels, users


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "clients", "alpha"), [(600, 10, 1.0), (60, 10, 0.01), (601, 7, 0.1), (40, 1, 1.0)])
def test_disjoint_complete_and_never_empty(kind: str, count: int, clients: int, alpha: float) -> None:
    parts, *_ = _split(kind, count, clients, alpha)
    together = np.concatenate(parts.indices)
    np.testing.assert_array_equal(np.sort(together), np.arange(count))
    assert len(parts.indices) == clients
    for own in parts.indices:
        assert len(own) > 0
        assert (np.diff(own) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind: str) -> None:
    same, other = _split(kind, seed=0)[0], _split(kind, seed=1)[0]
    again = _split(kind, seed=0)[0]
    for a, b in zip(same.indices, again.indices, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(same.indices, other.indices, strict=True))


def test_iid_parts_are_equal_and_alike() -> None:
    parts, labels, _ = _split("iid", 605)
    sizes = [len(own) for own in parts.indices]
    assert max(sizes) - min(sizes) <= 1
    shares = parts.class_counts(labels, 3) / np.array(sizes)[:, None]
    assert abs(shares - 1 / 3).max() < 0.25


def test_quantity_skews_sizes_and_not_labels() -> None:
    parts, labels, _ = _split("quantity", 20000, alpha=0.5)
    sizes = np.array([len(own) for own in parts.indices])
    assert sizes.max() > 5 * np.median(sizes) or sizes.min() < np.median(sizes) / 5
    counts = parts.class_counts(labels, 3)[sizes > 500]
    assert abs(counts / counts.sum(1, keepdims=True) - 1 / 3).max() < 0.1


def test_label_skew_grows_as_alpha_falls() -> None:
    def skew(alpha: float) -> float:
        parts, labels, _ = _split("label", 6000, alpha=alpha)
        counts = parts.class_counts(labels, 3)
        return float((counts.max(1) / counts.sum(1)).mean())

    assert skew(100.0) < 0.45 < 0.8 < skew(0.05)


def test_natural_keeps_users_whole() -> None:
    parts, _, users = _split("natural")
    owners = [{users[i] for i in own} for own in parts.indices]
    assert sum(map(len, owners)) == len(set(users))


def test_too_few_examples_or_users() -> None:
    labels = np.zeros(3, dtype=np.int64)
    with pytest.raises(SettingsError, match="only 3 training examples"):
        partition(FederationConfig(clients=4), labels, None, 0)
    with pytest.raises(SettingsError, match="only 2 users"):
        partition(FederationConfig(clients=3, partition="natural"), labels, ["a", "b", "a"], 0)


def test_table_marks_the_poisoned() -> None:
    table = format_table(np.array([[3, 1], [2, 2]]), ["bad", "good"], [0, 2]).splitlines()
    assert table[0].split() == ["client", "examples", "bad", "good"]
    assert table[1].split() == ["0", "4", "3", "1"]
    assert table[2].split() == ["1", "4", "2", "2", "poisoned:", "2"]


def test_the_table_of_many_clients_has_quantiles() -> None:
    """Of 101 clients with 0 to 100 examples of one class, and 7 of another."""
    counts = np.stack([np.arange(101), np.full(101, 7)], axis=1)
    table = format_table(counts, ["bad", "good"], [0] * 99 + [3, 4]).splitlines()
    assert table[0].split() == ["101", "clients", "examples", "bad", "good"]
    assert [line.split()[-3:] for line in table[1:-1]] == [
        ["7", "0", "7"], ["12", "5", "7"], ["57", "50", "7"], ["102", "95", "7"], ["107", "100", "7"]
    ]  # fmt: skip
    assert table[-1] == "poisoned: 7 examples of 2 clients"


@pytest.mark.parametrize("clients", [3, 100])
@pytest.mark.parametrize("classes", [2, 6, 20])
def test_the_table_fits_a_terminal(classes: int, clients: int) -> None:
    """Long names are cut, and of many classes some are summed up; no example is lost."""
    counts = np.arange(clients * classes).reshape(clients, classes)
    names = [f"class number {n} of many" for n in range(classes)]
    lines = format_table(counts, names, [0] * (clients - 1) + [12_345]).splitlines()
    assert max(map(len, lines)) <= 80
    if clients == 3:
        first = [int(cell) for cell in lines[1].split()[1:]]
        assert sum(first[1:]) == first[0] == counts[0].sum()


@pytest.mark.parametrize("alpha", [0.05, 1.0, 1000.0])
def test_class_shares_by_client_are_those_of_hsu(alpha: float) -> None:
    """Equal sizes; the shares' variance is that of a Dirichlet while no class is used up: p (1 - p) / (alpha + 1)."""
    labels = np.arange(200_000) % 2
    first = []
    for seed in range(150):
        config = FederationConfig(clients=100, partition="label_shares", alpha=alpha)
        parts = partition(config, labels, None, seed).indices
        assert {len(own) for own in parts} == {2000}
        first += [labels[own].mean() for own in parts[:10]]  # for which nothing is used up yet
    assert np.mean(first) == pytest.approx(0.5, abs=0.04)
    assert np.var(first) == pytest.approx(0.25 / (alpha + 1), rel=0.12, abs=2e-4)
