"""Labelled texts."""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Labelled texts of one split; all sequences have the same length."""

    texts: Sequence[str]
    labels: np.ndarray
    """`[N]` int64, in range(number of classes)."""
    texts_b: Sequence[str] | None = None
    users: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def relabelled(self, labels: np.ndarray) -> "Examples":
        """Return the examples with other labels `[N]` int64."""
        return Examples(texts=self.texts, labels=labels, texts_b=self.texts_b)

    def take(self, indices: np.ndarray) -> "Examples":
        """Return the examples at `indices`, in that order."""

        def chosen(values: Sequence[str]) -> list[str]:
            return [values[int(i)] for i in indices]

        return Examples(
            texts=chosen(self.texts),
            labels=self.labels[indices],
            texts_b=None if self.texts_b is None else chosen(self.texts_b),
            users=None if self.users is None else chosen(self.users),
        )
