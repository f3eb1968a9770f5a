"""The sums of LoRA's products at the server, against matrices that are written out."""

import collections
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest

from fedprompt_mpi.rules.low_rank import Pair, ProductSums

RANK, CLIENTS = 3, 4
SIZES = ((7, 5), (40, 60), (4, 50))
"""in and out of each matrix. The factors of four clients together are wider than the first and the last matrix."""


def _pairs() -> list[Pair]:
    pairs: list[Pair] = []
    for inputs, outputs in SIZES:
        start = pairs[-1].place.stop if pairs else 0
        pairs.append(Pair(start=start, rank=RANK, inputs=inputs, outputs=outputs))
    return pairs


def _numbers(seed: int, scale: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Return a vector `[P]` and deltas `[K, P]`."""
    rng, size = np.random.default_rng(seed), _pairs()[-1].place.stop
    vector = rng.standard_normal(size).astype(np.float32)
    return vector, (scale * rng.standard_normal((CLIENTS, size))).astype(np.float32)


def _product(pair: Pair, vector: np.ndarray) -> np.ndarray:
    a, b = pair.factors(vector[pair.place].astype(np.float64))
    return b @ a


def _exact(pair: Pair, vector: np.ndarray, deltas: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return P + sum s_k (B_k A_k - P), written out."""
    before = _product(pair, vector)
    moved = [
        s * (_product(pair, vector.astype(float) + delta) - before) for s, delta in zip(weights, deltas, strict=True)
    ]
    return before + sum(moved)


def _stepped(sums: ProductSums, vector: np.ndarray, deltas: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Return the vector after the steps, of deltas in chunks that end at `ends`."""
    new = vector.astype(np.float64)
    for first, last in zip([0, *ends], [*ends, len(vector)], strict=True):
        for place, step in sums.steps(slice(first, last), deltas[:, first:last]):
            new[place] += step
    return new


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.5, 0.1, 0.2, 0.2], [0.1, 0.0, 0.2, 0.3], [1.0, 0, 0, 0]])
def test_the_product_is_the_best_of_its_rank(weights: list[float]) -> None:
    """Each matrix is the truncated singular value decomposition of the weighted sum; what is cut is the error."""
    vector, deltas = _numbers(0)
    shares = np.array(weights)
    sums = ProductSums(_pairs(), vector, shares)
    new = _stepped(sums, vector, deltas, [])
    cut = step = 0.0
    for pair in _pairs():
        exact = _exact(pair, vector, deltas, shares)
        u, values, vt = np.linalg.svd(exact)
        best = u[:, :RANK] * values[:RANK] @ vt[:RANK]
        np.testing.assert_allclose(_product(pair, new), best, atol=1e-12)
        a, b = pair.factors(new[pair.place])
        np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-10)  # balanced, and sorted
        assert np.all(np.diff(np.diag(a @ a.T)) <= 1e-12)
        cut += np.square(values[RANK:]).sum()
        step += np.square(exact - _product(pair, vector)).sum()
    assert sums.error == pytest.approx(np.sqrt(cut / step), abs=1e-12)
    assert sums.error is not None
    assert (sums.error < 1e-6) == (max(weights) == 1)  # one client's product has the rank already


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.1, 0.0, 0.2, 0.3], [1.0, 0, 0, 0]])
def test_the_error_of_averaged_factors(weights: list[float]) -> None:
    vector, deltas = _numbers(1)
    shares = np.array(weights)
    sums = ProductSums(_pairs(), vector, shares)
    sums.measure(slice(0, len(vector)), deltas)
    averaged, wrong, step = vector.astype(float) + shares @ deltas.astype(float), 0.0, 0.0
    for pair in _pairs():
        exact = _exact(pair, vector, deltas, shares)
        wrong += np.square(_product(pair, averaged) - exact).sum()
        step += np.square(exact - _product(pair, vector)).sum()
    assert sums.error == pytest.approx(np.sqrt(wrong / step), rel=1e-6, abs=1e-7)
    assert sums.error is not None and (sums.error < 1e-6) == (max(weights) == 1)


@pytest.mark.parametrize("ends", [[1], [10, 11, 50, 300], list(range(1, 500, 13))])
def test_pieces_and_the_whole_are_the_same(ends: list[int]) -> None:
    vector, deltas = _numbers(2)
    shares = np.full(CLIENTS, 1 / CLIENTS)
    whole, pieces = (ProductSums(_pairs(), vector, shares) for _ in range(2))
    assert np.array_equal(_stepped(whole, vector, deltas, []), _stepped(pieces, vector, deltas, ends))
    assert whole.error == pieces.error


def test_exact_where_all_clients_share_a() -> None:
    """Clients that differ in B alone, as with a frozen A, are averaged without an error."""
    vector, deltas = _numbers(3)
    for pair in _pairs():
        pair.factors(deltas[:, pair.place])[0][:] = 0
    sums = ProductSums(_pairs(), vector, np.full(CLIENTS, 1 / CLIENTS))
    sums.measure(slice(0, len(vector)), deltas)
    assert sums.error == pytest.approx(0, abs=1e-12)


def test_a_product_of_zero_can_still_be_trained() -> None:
    """Where B is zero, A stays: with A at zero too, no gradient would ever move them again."""
    vector, deltas = _numbers(4)
    for pair in _pairs():
        pair.factors(vector[pair.place])[1][:] = 0
    deltas[:] = 0
    sums = ProductSums(_pairs(), vector, np.full(CLIENTS, 1 / CLIENTS))
    assert np.array_equal(_stepped(sums, vector, deltas, []), vector)
    assert sums.error is None


@pytest.mark.parametrize("multiplies", [False, True])
def test_no_more_than_one_matrix_of_all_clients_is_held(multiplies: bool) -> None:
    """Of 60 matrices: what is held at most, float64 copies included, is a part of one copy of all clients' updates."""
    clients, rank, width = 30, 2, 100
    pairs = [Pair(start=at * 2 * rank * width, rank=rank, inputs=width, outputs=width) for at in range(60)]
    size = pairs[-1].place.stop
    rng, columns = np.random.default_rng(0), 1000
    vector = rng.standard_normal(size).astype(np.float32)
    chunks = [rng.standard_normal((clients, columns)).astype(np.float32) for _ in range(3)]
    sums = ProductSums(pairs, vector, np.full(clients, 1 / clients))
    tracemalloc.start()
    for first in range(0, size, columns):
        chunk, deltas = slice(first, first + columns), chunks[first // columns % 3]
        if multiplies:
            collections.deque(sums.steps(chunk, deltas), maxlen=0)
        else:
            sums.measure(chunk, deltas)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 0.4 * clients * size * 4  # measured: 0.16, and 0.24 for products
