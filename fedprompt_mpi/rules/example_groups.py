"""Groups of training examples whose gradients point the same way, and the groups that are taken for poison.

Each client transforms the gradient of the prompt of each of its examples, and sorts its examples of one label into
groups by the low frequencies. The server sorts the centroids of these groups: those of poisoned examples lie together,
on most clients, and far from the rest of the label.

The paper reduces the gradients to 2 dimensions, takes one client's examples as a whole and two clusters of them. Here
the labels of a classification would be those clusters, so that each label is sorted by itself; and since rare poison is
not one half of two, each client makes more groups, which the server puts together again.

Legend: n examples, V virtual tokens, D width of the word embeddings, F low frequencies, m groups of all clients.

References:
    Zhao et al., ProtegoFed: Backdoor-Free Federated Instruction Tuning with Interspersed Poisoned Data, 2026,
    arXiv:2603.00516 (transform, low frequencies, clustering on clients and of their centroids).
"""

import dataclasses

import numpy as np

from fedprompt_mpi.rules.aggregator_base import TINY
from fedprompt_mpi.rules.setting import setting

MOST_COMPARED = 2000
"""Examples of a client and label that are compared pair by pair; others join the nearest group."""
SAME_GROUP = 0.5
"""Mean cosine distance up to which the server takes groups of different clients for one."""
LARGEST_SHARE = 0.4
"""Share of a label's examples up to which a group may be poison: more than that is what the label is about."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleFilterOptions:
    """Options of the example filter."""

    filter_round: int | None = setting(None, at_least=1)
    """Before this round, clients look for poisoned examples among their own, by the gradients of the prompt, and leave
    them out from there on. The backdoor must have been learnt by then."""
    filter_groups: int = setting(8, at_least=2, at_most=100)
    """filter_round: groups that a client sorts its examples of a label into."""
    filter_share: float = setting(0.5, above=0, at_most=1)
    """filter_round: share of the frequencies, of tokens as of their numbers, that are compared, from the lowest on."""
    filter_cosine: float = setting(0.25, at_least=-1, at_most=1)
    """filter_round: a group is left out if the cosine between it and the largest group of its label is below this."""


def low_frequencies(gradients: np.ndarray, share: float) -> np.ndarray:
    """Return the direction of each gradient in its low frequencies `[n, F]` float32, of unit norm.

    A gradient that is zero, or not finite, has none: zeros.

    Args:
        gradients: `[n, V, D]` float32.
        share: of the frequencies of each axis that are kept, at least one.
    """
    from scipy.fft import dctn

    _, tokens, width = gradients.shape
    rows, columns = corner(tokens, width, share)
    finite = np.isfinite(gradients).all(axis=(1, 2), keepdims=True)
    spectra = np.asarray(dctn(np.where(finite, gradients, 0), norm="ortho", axes=(1, 2)))
    return _unit(spectra[:, :rows, :columns].reshape(len(gradients), rows * columns))


def corner(tokens: int, width: int, share: float) -> tuple[int, int]:
    """Return how many frequencies are kept along the axes of V = `tokens` and D = `width`."""
    return max(1, round(share * tokens)), max(1, round(share * width))


def local_groups(features: np.ndarray, most: int) -> np.ndarray:
    """Return the group of each of a client's examples of one label `[n]` int64, from 0.

    Args:
        features: `[n, F]` float32, of unit norm.
        most: groups.
    """
    compared = np.unique(np.linspace(0, len(features) - 1, min(len(features), MOST_COMPARED)).astype(np.int64))
    groups = _agglomerate(features[compared], number=min(most, len(compared)))
    if len(compared) == len(features):
        return groups
    return (features @ centroids(features[compared], groups).T).argmax(axis=1)


def centroids(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the mean direction of each group `[m, F]` float32, of unit norm."""
    sums = np.zeros((int(groups.max(initial=-1)) + 1, features.shape[1]), dtype=np.float32)
    np.add.at(sums, groups, features)
    return _unit(sums)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Groups of clients that the server takes for one, within a label."""

    members: np.ndarray
    """`[.]` int64, places among the m groups of all clients."""
    examples: int
    clients: int
    cosine: float
    """Between it and the largest group of its label."""
    is_odd: bool
    """Taken for poison."""


def global_groups(means: np.ndarray, counts: np.ndarray, clients: np.ndarray, cosine: float) -> list[Group]:
    """Sort the groups of all clients of one label, the largest first.

    A group is odd if it is far from the largest one of its label, is found on at least half of the clients, and is no
    main part of the label.

    Args:
        means: `[m, F]` float32, mean directions.
        counts: `[m]` int64, examples of each.
        clients: `[m]` int64, whose it is.
        cosine: below which a group is far from the largest one.
    """
    labels = _agglomerate(means, distance=SAME_GROUP)
    total, everyone = int(counts.sum()), len(np.unique(clients))
    sizes = np.bincount(labels, weights=counts)
    found: list[Group] = []
    centre = np.zeros(0)
    for label in np.argsort(-sizes, kind="stable"):
        members = np.flatnonzero(labels == label)
        (mean,) = _unit((means[members] * counts[members, None]).sum(axis=0, keepdims=True))
        centre = centre if found else mean
        examples, homes, angle = int(counts[members].sum()), len(np.unique(clients[members])), float(mean @ centre)
        is_odd = angle < cosine and examples < LARGEST_SHARE * total and 2 * homes >= everyone
        found.append(Group(members=members, examples=examples, clients=homes, cosine=angle, is_odd=is_odd))
    return found


def _agglomerate(features: np.ndarray, *, number: int | None = None, distance: float | None = None) -> np.ndarray:
    """Merge the nearest groups, by their mean cosine distance, down to a number or up to a distance; `[n]` int64."""
    from sklearn.cluster import AgglomerativeClustering

    if len(features) < 2:
        return np.zeros(len(features), dtype=np.int64)
    distances = np.clip(1 - features.astype(np.float64) @ features.T.astype(np.float64), 0, None)
    np.fill_diagonal(distances, 0)
    merging = AgglomerativeClustering(
        n_clusters=number,  # pyright: ignore[reportArgumentType] - None with a distance, as its docstring says
        distance_threshold=distance,
        metric="precomputed",
        linkage="average",
    )
    return merging.fit_predict(distances).astype(np.int64)


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(norms, TINY)).astype(np.float32)
