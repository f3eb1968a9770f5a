"""Kinds of texts that labels have in common, and those that only one of them has.

Where two labels pull the prompt in opposite directions, as those of a binary classification mostly do, a text moves
the prompt along the same line whichever of the two it has. The kinds of texts, after whitening and with the sign
turned, are then those of both labels; but texts with a trigger are all answered alike.

The clients find the kinds together, by spherical k-means: the server begins with the groups that it has put together
(`rules.example_groups`), and in each step every client adds the directions of its texts of each kind to the sum that is
the kind's next direction. Sums are taken in whole numbers, so that they do not depend on who adds first. Then the texts
of both labels are counted by kind. This is ours; the paper compares centroids of one step.

Legend: n examples, k whitened axes, F low frequencies, G kinds, K clients.

References:
    Dhillon and Modha, Concept decompositions for large sparse text data using clustering, 2001 (spherical k-means).
"""

import dataclasses

import numpy as np

from fedprompt_mpi.rules.example_groups import WHOLE, Group, may_be_poison, unit
from fedprompt_mpi.rules.pairwise import exact_product

KINDS = 16
"""Kinds of each label, at most."""
STEPS = 3
"""Of k-means."""
NONE = -1
"""The kind of an example that has no direction."""


def first_directions(groups: list[Group]) -> np.ndarray:
    """Return the directions of a label's largest groups `[G, F]` float32, of at least one; zeros if they are fewer."""
    largest = np.stack([group.mean for group in groups[:KINDS]])
    return np.pad(largest, ((0, KINDS - len(largest)), (0, 0)))


def kinds_of(coordinates: np.ndarray, axes: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return the kind of each of a client's examples, the one of the nearest direction `[n]` int64.

    Args:
        coordinates: `[n, k]` float32, whitened.
        axes: `[k, F]` float32.
        directions: `[G, F]` float32; those that are zero are nobody's.
    """
    cosines = exact_product(unit(coordinates), exact_product(axes, directions.T))
    cosines[:, ~directions.any(axis=1)] = -np.inf
    return np.where(coordinates.any(axis=1), cosines.argmax(axis=1), NONE)


def sums_of(coordinates: np.ndarray, axes: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Return the sum of the directions of each kind's examples, in whole numbers `[G, F]` float64."""
    sums = np.zeros((KINDS, coordinates.shape[1]))
    np.add.at(sums, kinds[kinds != NONE], unit(coordinates)[kinds != NONE])
    return np.rint(exact_product(sums, axes) * WHOLE)


def count(kinds: np.ndarray) -> np.ndarray:
    """Return how many examples are of each kind `[G]` int64."""
    return np.bincount(kinds[kinds != NONE], minlength=KINDS)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Texts of one label."""

    examples: int
    clients: int
    counterpart: float
    """How common the kind is in the opposite labels, in times how common it is in its own."""
    is_odd: bool
    """Taken for poison."""


def judge(own: np.ndarray, opposite: np.ndarray, threshold: float) -> list[Kind]:
    """Return the kinds of a label; one is odd if it is rare in the opposite labels, and spread over the clients.

    Args:
        own: `[K, G]`, examples of each client.
        opposite: `[G]`, examples of the opposite labels, with the sign turned.
        threshold: below which it is rare.
    """
    by_kind, found = own.sum(axis=0), []
    for kind, examples in enumerate(by_kind):
        share, there = examples / max(1, by_kind.sum()), opposite[kind] / max(1, opposite.sum())
        counterpart = float(there / share) if examples else 1.0
        is_odd = counterpart < threshold and may_be_poison(own[:, kind], int(by_kind.sum()))
        found.append(
            Kind(examples=int(examples), clients=int((own[:, kind] > 0).sum()), counterpart=counterpart, is_odd=is_odd)
        )
    return found
