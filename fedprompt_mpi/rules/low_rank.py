"""LoRA at the server: what the average of factors leaves out, and the average of products in its place.

A client sends A_k `[r, in]` and B_k `[out, r]` of each adapted matrix, and means their product B_k A_k. The mean of the
A_k times the mean of the B_k is not the mean of the products. Everything here goes matrix by matrix, so that no more
than one matrix's factors of all clients are held.

Legend: K clients, s weights, r rank, dA and dB a client's changes of A and B, P parameters.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from fedprompt_mpi.rules.aggregator_base import TINY
from fedprompt_mpi.rules.pairwise import one_thread

DEAD = 1e-7
"""A singular value below this share of the largest is none: float32 has no more digits."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Where the factors of one matrix stand in the vector: A `[r, in]`, and right behind it B `[out, r]`."""

    start: int
    rank: int
    inputs: int
    outputs: int

    @property
    def place(self) -> slice:
        """The coordinates of both."""
        return slice(self.start, self.start + self.rank * (self.inputs + self.outputs))

    def factors(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return A `[..., r, in]` and B `[..., out, r]`, views into the numbers of this pair `[..., r (in + out)]`."""
        middle, shape = self.rank * self.inputs, numbers.shape[:-1]
        return (
            numbers[..., :middle].reshape(*shape, self.rank, self.inputs),
            numbers[..., middle:].reshape(*shape, self.outputs, self.rank),
        )


class ProductSums:
    """The weighted sums of the products of one round, from chunks of the clients' deltas as they come.

    The exact sum is P + sum s_k (B_k A_k - P), where P is the product before the round.
    """

    def __init__(self, pairs: Sequence[Pair], vector: np.ndarray, weights: np.ndarray) -> None:
        """Begin a round.

        Args:
            pairs: of all adapted matrices, in the order of the vector.
            vector: `[P]` float32 before the round; it is copied.
            weights: `[K]` float64.
        """
        self._pairs, self._before = list(pairs), vector.copy()
        self._kept = slice(None) if weights.all() else np.flatnonzero(weights)
        self._weights = weights[self._kept]
        self._held: np.ndarray | None = None
        self._squared_error = self._squared_step = 0.0

    @property
    def error(self) -> float | None:
        """How far the result is from the exact sums, relative to their step; None without a step.

        Both are Frobenius norms over all matrices.
        """
        return float(np.sqrt(self._squared_error / self._squared_step)) if self._squared_step > TINY else None

    def measure(self, chunk: slice, deltas: np.ndarray) -> None:
        """Take note of what averaging the factors leaves out: sum s_k dB_k dA_k - (sum s_k dB_k) (sum s_k dA_k).

        Args:
            chunk: the coordinates.
            deltas: `[K, chunk]` float32.
        """
        for pair, own in self._whole(chunk, deltas):
            (a, b), (da, db) = self._parts(pair, own)
            mean_da, mean_db = np.einsum("k,kri->ri", self._weights, da), np.einsum("k,kor->or", self._weights, db)
            products = self._stack(da, db)
            self._squared_error += _squared_norm(_joined(products, (mean_da, -mean_db)))
            self._squared_step += _squared_norm(_joined(products, (a, mean_db), (mean_da, b)))

    def steps(self, chunk: slice, deltas: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the coordinates of each pair that is complete, and the step to the factors of its sum of products.

        These are the best of their rank: B = U sqrt(S) and A = sqrt(S) V^T of the truncated singular value
        decomposition (Eckart and Young 1936). Where a singular value is zero, B is zero and A stays as it was: training
        goes on from there.

        Args:
            chunk: the coordinates.
            deltas: `[K, chunk]` float32.
        """
        for pair, own in self._whole(chunk, deltas):
            (a, b), (da, db) = self._parts(pair, own)
            left = 1.0 - float(self._weights.sum())
            sums = _joined(self._stack(a + da, b + db), (a, left * b))
            with one_thread():
                u, values, vt = _singular_values(*sums)
            alive = min(pair.rank, int((values > DEAD * max(values[0], TINY)).sum()))
            roots, new_a, new_b = np.sqrt(values[:alive]), a.copy(), np.zeros_like(b)
            new_a[:alive], new_b[:, :alive] = roots[:, None] * vt[:alive], u[:, :alive] * roots
            self._squared_error += float(np.square(values[alive:]).sum())
            self._squared_step += _squared_norm(_joined(sums, (a, -b)))
            yield pair.place, np.concatenate([(new_a - a).ravel(), (new_b - b).ravel()])

    def _whole(self, chunk: slice, deltas: np.ndarray) -> Iterator[tuple[Pair, np.ndarray]]:
        """Yield each pair whose last coordinates have come, and its deltas `[k, r (in + out)]` of who counts."""
        while self._pairs:
            place = self._pairs[0].place
            first, last = max(place.start, chunk.start), min(place.stop, chunk.stop)
            if first >= last:
                return
            if self._held is None:
                self._held = np.empty((len(self._weights), place.stop - place.start), dtype=np.float32)
            own = deltas[:, first - chunk.start : last - chunk.start][self._kept]
            self._held[:, first - place.start : last - place.start] = own
            if last < place.stop:
                return
            held, self._held = self._held, None
            yield self._pairs.pop(0), held

    def _parts(self, pair: Pair, deltas: np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """Return A and B before the round, and dA `[K, r, in]` and dB `[K, out, r]`, all float64."""
        before = pair.factors(self._before[pair.place].astype(np.float64))
        return before, pair.factors(deltas.astype(np.float64))

    def _stack(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return A `[K r, in]` and B `[out, K r]` whose product is sum s_k B_k A_k."""
        scaled = self._weights[:, None, None] * b
        return a.reshape(-1, a.shape[-1]), scaled.transpose(1, 0, 2).reshape(b.shape[1], -1)


def _joined(*pairs: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B whose product is the sum of the products of such pairs."""
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs], axis=1)


def _squared_norm(factors: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the squared Frobenius norm of B A, by the shorter way."""
    a, b = factors
    with one_thread():
        if len(a) < min(a.shape[1], b.shape[0]):
            return max(0.0, float(np.vdot(b.T @ b, a @ a.T)))
        return float(np.square(b @ a).sum())


def _singular_values(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return U, S and V^T of B A, without making it if it is larger than its factors."""
    if len(a) >= min(a.shape[1], b.shape[0]):
        return np.linalg.svd(b @ a, full_matrices=False)
    (q_b, r_b), (q_a, r_a) = np.linalg.qr(b), np.linalg.qr(a.T)
    u, values, vt = np.linalg.svd(r_b @ r_a.T)
    return q_b @ u, values, vt @ q_a.T
