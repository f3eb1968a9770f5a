"""Batches: what a client trains on depends on seed, round and client, and little of it is padding."""

import math

import numpy as np
import pytest

from fedprompt_mpi.config import ClientConfig
from fedprompt_mpi.text.batches import TOKENS_PER_EVALUATION_BATCH, Own, collate, evaluation_batches, local_steps
from fedprompt_mpi.text.tokens import TokenTable


def _table(lengths: list[int]) -> TokenTable:
    rows = [(list(range(10 * i, 10 * i + n)), n - 1) for i, n in enumerate(lengths)]
    return TokenTable.build(rows, np.arange(len(lengths)))


def _steps(count: int, batch_size: int, steps: int, epochs: int | None = None, client: int = 0, round_: int = 1):
    rng = np.random.default_rng(0)
    own = Own(lengths=rng.integers(5, 60, size=count), labels=rng.integers(2, size=count))
    config = ClientConfig(batch_size=batch_size, steps=max(steps, 1), epochs=epochs)
    return own.lengths, local_steps(own, config, seed=0, round_=round_, client=client)


def test_collate_by_hand() -> None:
    batch = collate(_table([2, 4, 1]), np.array([1, 0]))
    np.testing.assert_array_equal(batch.ids, [[10, 11, 12, 13], [0, 1, 0, 0]])
    np.testing.assert_array_equal(batch.mask, [[1, 1, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(batch.answers, [3, 1])
    np.testing.assert_array_equal(batch.labels, [1, 0])


@pytest.mark.parametrize(
    ("count", "batch_size", "steps"), [(100, 8, 10), (100, 8, 40), (5, 8, 3), (1, 1, 4), (17, 4, 4)]
)
def test_as_many_steps_as_asked_for(count: int, batch_size: int, steps: int) -> None:
    _, batches = _steps(count, batch_size, steps)
    assert len(batches) == steps
    for rows in batches:
        assert 0 < len(rows) <= batch_size
        assert len(set(rows.tolist())) == len(rows)  # no example twice in a step


@pytest.mark.parametrize(("count", "batch_size", "epochs"), [(100, 8, 1), (13, 4, 3), (3, 8, 2)])
def test_an_epoch_holds_every_example_once(count: int, batch_size: int, epochs: int) -> None:
    _, batches = _steps(count, batch_size, 0, epochs)
    assert len(batches) == epochs * -(-count // batch_size)
    np.testing.assert_array_equal(np.bincount(np.concatenate(batches)), np.full(count, epochs))


def test_batches_are_of_similar_length() -> None:
    lengths, batches = _steps(800, 8, 100)
    spread = np.mean([lengths[rows].max() - lengths[rows].mean() for rows in batches])
    assert spread < 0.1 * lengths.mean()


@pytest.mark.parametrize("away", [0.0, 1.0, 2.0])
def test_a_batch_has_the_classes_of_a_random_one(away: float) -> None:
    """Chi-square over 10,000 batches, though the classes' lengths differ by standard deviations.

    The number of examples of class 1 in a batch of 8 out of 4,000, half of them of class 1, is hypergeometric.
    """
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % 2
    own = Own(lengths=np.rint(rng.normal(40 + 8 * away * labels, 8)).clip(3).astype(int), labels=labels)
    config = ClientConfig(batch_size=8, steps=500)
    found = np.zeros(9)
    spread = []
    for round_ in range(20):
        batches = local_steps(own, config, seed=0, round_=round_, client=0)
        found += np.bincount([labels[rows].sum() for rows in batches], minlength=9)
        spread += [np.std(own.lengths[rows][labels[rows] == 0]) for rows in batches if (labels[rows] == 0).any()]
    total, half = math.comb(4000, 8), [math.comb(2000, k) for k in range(9)]
    expected = found.sum() * np.array([half[k] * half[8 - k] / total for k in range(9)])
    assert found.sum() == 10_000
    assert ((found - expected) ** 2 / expected).sum() < 26.12  # 99.9 % of the distribution with 8 degrees of freedom
    assert np.mean(spread) < 1.5  # and yet lengths are alike: of all examples of a class the deviation is 8


def test_without_bucketing_batches_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    own = Own(lengths=rng.integers(5, 60, size=400), labels=rng.integers(2, size=400))
    batches = local_steps(own, ClientConfig(steps=50, bucketing=False), seed=0, round_=1, client=0)
    assert np.mean([np.std(own.lengths[rows]) for rows in batches]) > 0.7 * np.std(own.lengths)


def test_clients_meet_with_batches_of_similar_length() -> None:
    """At each step, all clients' batches have about the same length, though each client draws its own."""
    means = []
    for client in range(6):
        lengths, batches = _steps(400, 8, 20, client=client)
        means.append([lengths[rows].mean() for rows in batches])
    columns = np.array(means)
    assert columns.std(axis=0).mean() < 0.25 * columns.std(axis=1).mean()
    assert len({tuple(row) for row in means}) == 6


def test_rounds_and_clients_differ_and_repeat() -> None:
    def flat(**kwargs: int) -> list[int]:
        return np.concatenate(_steps(100, 8, 10, **kwargs)[1]).tolist()  # pyright: ignore[reportArgumentType]

    assert flat() == flat()
    assert flat() != flat(round_=2)
    assert flat() != flat(client=1)


def test_evaluation_holds_every_row_once_in_bounded_batches() -> None:
    table = _table(np.random.default_rng(0).integers(3, 120, size=300).tolist())
    batches = evaluation_batches(table.lengths, 20)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(300))
    for rows in batches:
        assert len(rows) * (table.lengths[rows].max() + 20) <= TOKENS_PER_EVALUATION_BATCH
    assert evaluation_batches(_table([]).lengths, 20) == []
