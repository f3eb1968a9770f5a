"""Groups of training examples whose gradients point the same way, and the groups that are taken for poison.

Each client transforms the gradient of the prompt of each of its examples, keeps the low frequencies, and sorts its
examples of one label into groups. The server sorts the centroids of these groups: those of poisoned examples lie
together, on most clients, and far from the rest of the label.

The paper reduces the gradients to 2 dimensions, takes one client's examples as a whole and two clusters of them. Here
the labels of a classification would be those clusters, so that each label is sorted by itself; and since rare poison is
not one half of two, each client makes more groups, which the server puts together again. What most texts have in common
hides what a few have: groups are formed after whitening, in which each of the strongest axes counts alike.

Where two labels pull the prompt in opposite directions, all of a label's examples are near to each other, and the
groups are only the beginning of what `rules.example_kinds` does.

Legend: n examples, V virtual tokens, D width of the word embeddings, F low frequencies, k whitened axes, L labels, K
clients, m groups of all clients.

References:
    Zhao et al., ProtegoFed: Backdoor-Free Federated Instruction Tuning with Interspersed Poisoned Data, 2026,
    arXiv:2603.00516 (transform, low frequencies, clustering on clients and of their centroids; whitening and the
    parting of a label in two are ours).
"""

import dataclasses
import math

import numpy as np

from fedprompt_mpi.rules.aggregator_base import TINY
from fedprompt_mpi.rules.pairwise import exact_product, one_thread
from fedprompt_mpi.rules.setting import setting

MOST_COMPARED = 2000
"""Examples of a client and label, or groups of all clients, that are compared pair by pair; others join the nearest."""
EXAMPLES_PER_AXIS = 8
"""Examples of a client for each whitened axis: of fewer, the axes would be those of single examples."""
SAME_GROUP = 0.5
"""Mean cosine distance up to which the server takes groups of different clients for one."""
LARGEST_SHARE = 0.3
"""Share of a label's examples up to which a group may be poison: more than that is what the label is about."""
MOST_OF_ONE = 0.5
"""Share of a group up to which one client may have it: poison that is spread is no one client's own."""
OPPOSITE = -0.8
"""Cosine between the mean directions of two labels up to which they pull the prompt in opposite directions."""
PARTINGS = 5
"""Times that a label is parted in two."""
MOST_GROWTH = 2.0
"""Times what was odd before that the odd part of a label may have; more, and the two parts are not apart."""
WHOLE = 2.0**20
"""Whole numbers that a sum of 1 is made of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleFilterOptions:
    """Options of the example filter."""

    filter_round: int | None = setting(None, at_least=1)
    """Before this round, clients look for poisoned examples among their own, by the gradients of the prompt, and leave
    them out from there on. The backdoor must have been learnt by then."""
    filter_restart: bool = setting(False)
    """filter_round: once examples have been left out, go back to the first prompt; rounds and schedule go on."""
    filter_groups: int = setting(8, at_least=2, at_most=100)
    """filter_round: groups that a client sorts its examples of a label into."""
    filter_share: float = setting(0.5, above=0, at_most=1)
    """filter_round: share of the frequencies kept along each axis of the gradient, from the lowest on."""
    filter_cosine: float = setting(0.45, at_least=-1, at_most=1)
    """filter_round: a group is odd if the cosine between it and the largest group of its label is below this; but
    see filter_counterpart."""
    filter_counterpart: float = setting(0.35, at_least=0)
    """filter_round: where two labels pull the prompt in opposite directions, a kind of text is odd instead if it
    is less than this times as common in the other label as in its own."""


def low_frequencies(gradients: np.ndarray, share: float) -> np.ndarray:
    """Return the direction of each gradient in its low frequencies `[n, F]` float32, of unit norm.

    A gradient that is zero, or whose transform is not finite, has none: zeros.

    Args:
        gradients: `[n, V, D]` float32.
        share: of the frequencies of each axis that are kept, at least one.
    """
    from scipy.fft import dctn

    _, tokens, width = gradients.shape
    rows, columns = corner(tokens, width, share)
    spectra = np.asarray(dctn(gradients, norm="ortho", axes=(1, 2)))[:, :rows, :columns]
    flat = spectra.reshape(len(gradients), rows * columns)
    return unit(np.where(np.isfinite(flat).all(axis=1, keepdims=True), flat, 0))


def corner(tokens: int, width: int, share: float) -> tuple[int, int]:
    """Return how many frequencies are kept along the axes of V = `tokens` and D = `width`."""
    return max(1, round(share * tokens)), max(1, round(share * width))


def whiten(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a client's examples along its strongest axes, on which all have a variance of 1 around their label's mean.

    Args:
        features: `[n, F]` float32, of unit norm or zeros; the latter come out as zeros.
        labels: `[n]` int64.

    Returns:
        Coordinates `[n, k]` float32, and the axes `[k, F]` float32, orthonormal.
    """
    has_direction = np.asarray(features.any(axis=1))
    there, of_label = np.unique(labels, return_inverse=True)
    means = np.zeros((len(there), features.shape[1]))
    for label in range(len(there)):
        if (chosen := has_direction & (of_label == label)).any():
            means[label] = features[chosen].mean(axis=0, dtype=np.float64)

    def centred(rows: np.ndarray) -> np.ndarray:
        return (features[rows] - means[of_label[rows]]) * has_direction[rows, None]

    some = _spaced(len(features))
    with one_thread():
        _, strengths, axes = np.linalg.svd(centred(some), full_matrices=False)
    deviations = strengths / math.sqrt(max(1, len(some)))
    count = min(max(1, len(some) // EXAMPLES_PER_AXIS), int((deviations > TINY).sum()))
    axes, coordinates = axes[:count], np.empty((len(features), count), dtype=np.float32)
    for rows in _blocks(len(features)):
        coordinates[rows] = exact_product(centred(rows), axes.T) / deviations[:count]
    return coordinates, axes.astype(np.float32)


def local_groups(coordinates: np.ndarray, most: int) -> np.ndarray:
    """Return the group of each of a client's examples of one label `[n]` int64, from 0.

    Args:
        coordinates: `[n, k]` float32; their directions are compared.
        most: groups.
    """
    return _agglomerate(unit(coordinates), number=most)


def centroids(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the mean direction of each group `[m, F]` float32, of unit norm."""
    sums = np.zeros((int(groups.max(initial=-1)) + 1, features.shape[1]), dtype=np.float32)
    np.add.at(sums, groups, features)
    return unit(sums)


def sums_in_two(coordinates: np.ndarray, axes: np.ndarray, is_odd: np.ndarray) -> np.ndarray:
    """Return the sums of a client's other examples of a label and of its odd ones, and their numbers `[2, F + 1]`.

    The sums are float64, in whole numbers; examples without a direction are left aside.

    Args:
        coordinates: `[n, k]` float32, whitened.
        axes: `[k, F]` float32.
        is_odd: `[n]` bool.
    """
    sums, has_direction = np.zeros((2, axes.shape[1] + 1)), coordinates.any(axis=1)
    for odd in (0, 1):
        chosen = has_direction & (is_odd == odd)
        along = coordinates[chosen].sum(axis=0, dtype=np.float64)
        sums[odd, :-1] = np.rint(exact_product(along[None], axes)[0] * WHOLE)
        sums[odd, -1] = chosen.sum()
    return sums


def nearer_to_odd(coordinates: np.ndarray, axes: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return which of a client's examples are nearer to the mean of the odd ones than to that of the others `[n]` bool.

    None is if there are no odd ones, or no others.

    Args:
        coordinates: `[n, k]` float32, whitened.
        axes: `[k, F]` float32.
        sums: `[2, F + 1]`, those of all clients.
    """
    if not sums[:, -1].all():
        return np.zeros(len(coordinates), dtype=bool)
    other, odd = exact_product(sums[:, :-1] / sums[:, -1:] / WHOLE, axes.T)
    return (exact_product(coordinates - (odd + other) / 2, (odd - other)[:, None])[:, 0] > 0) & coordinates.any(axis=1)


def whole_sum(rows: np.ndarray) -> np.ndarray:
    """Return the sum of directions `[n, F]` in whole numbers `[F]` float64: it does not depend on their order."""
    return sum(
        (np.rint(rows[block].astype(np.float64) * WHOLE).sum(axis=0) for block in _blocks(len(rows))),
        np.zeros(rows.shape[1]),
    )


def label_cosines(sums: np.ndarray) -> np.ndarray:
    """Return the cosines `[L, L]` between the mean directions of the labels.

    Args:
        sums: `[L, F]`, of the directions of each label's examples.
    """
    means = unit(sums)
    return exact_product(means, means.T)


def opposite_labels(cosines: np.ndarray) -> dict[int, list[int]]:
    """Return for each label those that pull the prompt in the opposite direction, by `label_cosines`."""
    return {label: np.flatnonzero(row <= OPPOSITE).tolist() for label, row in enumerate(cosines)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClientGroups:
    """The m groups of all clients, of one label."""

    means: np.ndarray
    """`[m, F]` float32, mean directions; zeros for a group without one."""
    examples: np.ndarray
    """`[m]` int64, in each."""
    clients: np.ndarray
    """`[m]` int64, whose it is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Groups of clients that the server takes for one, within a label."""

    members: np.ndarray
    """`[.]` int64, places among the m groups of all clients."""
    mean: np.ndarray
    """`[F]` float32, their mean direction."""
    examples: int
    clients: int
    cosine: float
    """Between it and the largest group of its label."""
    is_odd: bool
    """Taken for poison."""


def global_groups(found: ClientGroups, num_clients: int, cosine: float) -> list[Group]:
    """Sort the groups of all clients of one label, the largest first; those without a direction are left aside.

    A group is odd if it is far from the largest one of its label, and may be poison (`may_be_poison`).

    Args:
        found: by the clients.
        num_clients: of all clients, also those without an example of the label.
        cosine: below which a group is far from the largest one.
    """
    places = np.flatnonzero(found.means.any(axis=1))
    labels = _agglomerate(found.means[places], distance=SAME_GROUP)
    total, sizes = int(found.examples.sum()), np.bincount(labels, weights=found.examples[places])
    groups: list[Group] = []
    for label in np.argsort(-sizes, kind="stable"):
        members = places[labels == label]
        by_client = np.bincount(found.clients[members], weights=found.examples[members], minlength=num_clients)
        (mean,) = unit((found.means[members] * found.examples[members, None]).sum(axis=0, keepdims=True))
        angle = float((mean * (groups[0].mean if groups else mean)).sum())
        groups.append(
            Group(
                members=members,
                mean=mean,
                examples=int(by_client.sum()),
                clients=int((by_client > 0).sum()),
                cosine=angle,
                is_odd=angle < cosine and may_be_poison(by_client, total),
            )
        )
    return groups


def may_be_poison(by_client: np.ndarray, total: int) -> bool:
    """Return whether examples are on at least half of all clients, no one has most of them, and others are more.

    Args:
        by_client: `[K]`, of each client.
        total: examples of the label.
    """
    examples = by_client.sum()
    is_one = len(by_client) > 1 and by_client.max() > MOST_OF_ONE * examples
    return bool(2 * (by_client > 0).sum() >= len(by_client) and not is_one and examples < LARGEST_SHARE * total)


def _agglomerate(features: np.ndarray, *, number: int | None = None, distance: float | None = None) -> np.ndarray:
    """Merge the nearest groups, by their mean cosine distance, down to a number or up to a distance; `[n]` int64.

    Of very many, some are merged, and the others join the group whose mean is nearest.
    """
    compared = _spaced(len(features))
    groups = _merge(features[compared], None if number is None else min(number, len(compared)), distance)
    if len(compared) == len(features):
        return groups
    means = centroids(features[compared], groups)
    return exact_product(features.astype(np.float64), means.T).argmax(axis=1)


def _merge(features: np.ndarray, number: int | None, distance: float | None) -> np.ndarray:
    """Return the group of each of n features `[n]` int64; at least one group is left, or `number` of them."""
    from sklearn.cluster import AgglomerativeClustering

    if len(features) < 2:
        return np.zeros(len(features), dtype=np.int64)
    wide = features.astype(np.float64)
    distances = np.clip(1 - exact_product(wide, wide.T), 0, None).round(9)  # equal ones are not told apart by last bits
    np.fill_diagonal(distances, 0)
    merging = AgglomerativeClustering(
        n_clusters=number,  # pyright: ignore[reportArgumentType] - None with a distance, as its docstring says
        distance_threshold=distance,
        metric="precomputed",
        linkage="average",
    )
    return merging.fit_predict(distances).astype(np.int64)


def _blocks(count: int) -> list[np.ndarray]:
    """Return the places of so many rows, a few at a time: in float64 all would need much memory."""
    return [np.arange(at, min(at + MOST_COMPARED, count)) for at in range(0, count, MOST_COMPARED)]


def _spaced(count: int) -> np.ndarray:
    """Return places of at most MOST_COMPARED of so many, evenly spaced `[.]` int64."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_COMPARED)).astype(np.int64))


def unit(rows: np.ndarray) -> np.ndarray:
    """Return the direction of each row `[n, F]` float32; zeros have none."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(norms, TINY)).astype(np.float32)
