"""What the attacks make of numbers: rows that moved, words and labels that an upload tells, members.

Legend: W words, U uploads, S shadow uploads, C classes, P parameters.
"""

import numpy as np

OUTLIER = 6.0
"""Robust deviations from the median beyond which a row of the embeddings has moved."""
RIDGES = (0.1, 1.0, 10.0, 100.0, 1000.0)
"""Of the regression: with the last one every upload is told the mean of the shadows."""
LEAST_OF_CLASS = 5
TINY = 1e-30


def rows_that_moved(rows: np.ndarray) -> np.ndarray:
    """Return which rows of the word embeddings' update `[W, D]` are outliers `[W]` bool.

    Most words are in no batch. Without noise their rows are zero, and every other row has moved; with noise a row must
    be `OUTLIER` robust deviations longer than the median.

    References:
        Gupta et al., Recovering Private Text in Federated Learning of Language Models, NeurIPS 2022, arXiv:2205.08514
        (words from the embeddings' gradient).
    """
    lengths = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
    middle = np.median(lengths)
    return lengths > middle + OUTLIER * 1.4826 * np.median(np.abs(lengths - middle))


def calibrated(scores: np.ndarray, shadows: np.ndarray, floor: float) -> np.ndarray:
    """Return scores `[n, U]` in deviations from those of shadow uploads `[n, S]`, which were trained without.

    A deviation that is smaller than the floor is taken for that: of S scores it is itself uncertain.

    References:
        Carlini et al., Membership Inference Attacks From First Principles, S&P 2022, arXiv:2112.03570, Section V (LiRA,
        the offline variant with one normal distribution).
    """
    spread = np.maximum(shadows.std(axis=1, ddof=1), floor)
    return (scores - shadows.mean(axis=1, keepdims=True)) / spread[:, None]


def floor_of(shadows: np.ndarray) -> float:
    """Return half the median deviation of the scores `[m, S]` of texts that nobody was trained on."""
    return max(float(np.median(shadows.std(axis=1, ddof=1))) / 2, TINY)


def within_classes(
    inside: np.ndarray, outside: np.ndarray, labels: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores in deviations of those texts of the same class that were not in, so that a label says nothing.

    Texts of a class of which fewer than `LEAST_OF_CLASS` were not in are left out.

    Args:
        inside: scores of members `[n]`.
        outside: scores of others `[m]`.
        labels: their classes `[n]` and `[m]`.
    """
    members, others = [], []
    for label in np.unique(labels[1]):
        of_class = outside[labels[1] == label]
        if len(of_class) < LEAST_OF_CLASS:
            continue
        middle, spread = float(of_class.mean()), max(float(of_class.std()), TINY)
        members.append((inside[labels[0] == label] - middle) / spread)
        others.append((of_class - middle) / spread)
    if not members:
        return np.zeros(0), np.zeros(0)
    return np.concatenate(members), np.concatenate(others)


def unit_rows(deltas: np.ndarray) -> np.ndarray:
    """Return updates `[U, P]` scaled to length 1, float32; zeros stay."""
    norms = np.sqrt(np.einsum("ij,ij->i", deltas, deltas, dtype=np.float64))
    return (deltas / np.maximum(norms, TINY)[:, None]).astype(np.float32)


def label_shares(features: np.ndarray, shadows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return the class shares `[U, C]` of uploads, by ridge regression over shadow uploads.

    The ridge is the one with the least error on shadows that are left out.

    Args:
        features: `[U, C]`, how far each upload goes down the mean gradient of each class.
        shadows: `[S, C]`, the same of shadow uploads.
        shares: `[S, C]`, of what the shadows were trained on.
    """
    middle, spread = shadows.mean(axis=0), shadows.std(axis=0) + TINY
    design, asked = (np.column_stack([np.ones(len(of)), (of - middle) / spread]) for of in (shadows, features))

    def solution(ridge: float) -> np.ndarray:
        penalty = ridge * np.diag([0.0] + [1.0] * shadows.shape[1])
        return np.linalg.solve(design.T @ design + penalty, design.T)

    def left_out(ridge: float) -> float:
        hat = design @ solution(ridge)
        return float(np.square((shares - hat @ shares) / np.maximum(1 - np.diag(hat), TINY)[:, None]).sum())

    told = np.maximum(asked @ solution(min(RIDGES, key=left_out)) @ shares, 0.0)
    return told / np.maximum(told.sum(axis=1, keepdims=True), TINY)


def as_counts(shares: np.ndarray, total: int) -> np.ndarray:
    """Return whole numbers `[C]` of a total that are nearest to shares of it: the largest remainders are rounded up."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    for place in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[place] += 1
    return counts


def confidence(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of the true class for logits `[n, C]`: it is nearly normal over models.

    References:
        Carlini et al., arXiv:2112.03570, Section IV C.
    """
    logits = logits.astype(np.float64)
    true = logits[np.arange(len(labels)), labels]
    others = np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits)
    highest = others.max(axis=1)
    return true - highest - np.log(np.exp(others - highest[:, None]).sum(axis=1))
