"""Metrics of the answers to the test texts.

Legend: N texts, C classes.
"""

import dataclasses
from typing import Any

import numpy as np

from fedprompt_mpi.rules.registry import metrics


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a prompt has answered to the test texts."""

    labels: np.ndarray
    """`[N]` int64."""
    answers: np.ndarray
    """`[N]` int64."""
    classes: int
    """C."""

    @property
    def confusion(self) -> np.ndarray:
        """`[C, C]` int64: how many texts of a class (row) have an answer (column)."""
        counts = np.zeros((self.classes, self.classes), dtype=np.int64)
        np.add.at(counts, (self.labels, self.answers), 1)
        return counts


@metrics.register("accuracy")
def accuracy(found: Answers, options: Any) -> float:
    """Return the share of right answers."""
    return float((found.labels == found.answers).mean())


@metrics.register("macro_f1")
def macro_f1(found: Answers, options: Any) -> float:
    """Return the mean of the classes' F1; a class without labels and answers has none, as in scikit-learn."""
    confusion = found.confusion
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float((2 * confusion.diagonal()[seen > 0] / seen[seen > 0]).mean())


@metrics.register("balanced_accuracy")
def balanced_accuracy(found: Answers, options: Any) -> float:
    """Return the mean of the classes' recall; a class without labels has none.

    References:
        Brodersen et al., The Balanced Accuracy and Its Posterior Distribution, ICPR 2010.
    """
    confusion = found.confusion
    there = confusion.sum(axis=1)
    return float((confusion.diagonal()[there > 0] / there[there > 0]).mean())
