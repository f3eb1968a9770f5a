"""Batches: what a client trains on depends on seed, round and client, and little of it is padding."""

import numpy as np
import pytest

from fedprompt_mpi.config import ClientConfig
from fedprompt_mpi.text.batches import TOKENS_PER_EVALUATION_BATCH, collate, evaluation_batches, local_steps
from fedprompt_mpi.text.tokens import TokenTable


def _table(lengths: list[int]) -> TokenTable:
    rows = [(list(range(10 * i, 10 * i + n)), n - 1) for i, n in enumerate(lengths)]
    return TokenTable.build(rows, np.arange(len(lengths)))


def _steps(count: int, batch_size: int, steps: int, epochs: int | None = None, client: int = 0, round_: int = 1):
    lengths = np.random.default_rng(0).integers(5, 60, size=count)
    config = ClientConfig(batch_size=batch_size, steps=max(steps, 1), epochs=epochs)
    return lengths, local_steps(lengths, config, seed=0, round_=round_, client=client)


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
    batches = evaluation_batches(table, 20)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(300))
    for rows in batches:
        assert len(rows) * (table.lengths[rows].max() + 20) <= TOKENS_PER_EVALUATION_BATCH
    assert evaluation_batches(_table([]), 20) == []
