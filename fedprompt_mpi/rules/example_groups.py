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
from fedprompt_mpi.rules.pairwise import exact_product
from fedprompt_mpi.rules.setting import setting

MOST_COMPARED = 2000
"""Examples of a client and label, or groups of all clients, that are compared pair by pair; others join the nearest."""
SAME_GROUP = 0.5
"""Mean cosine distance up to which the server takes groups of different clients for one."""
LARGEST_SHARE = 0.3
"""Share of a label's examples up to which a group may be poison: more than that is what the label is about."""
MOST_OF_ONE = 0.5
"""Share of a group up to which one client may have it: poison that is spread is no one client's own."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleFilterOptions:
    """Options of the example filter."""

    filter_round: int | None = setting(None, at_least=1)
    """Before this round, clients look for poisoned examples among their own, by the gradients of the prompt, and leave
    them out from there on. The backdoor must have been learnt by then."""
    filter_groups: int = setting(8, at_least=2, at_most=100)
    """filter_round: groups that a client sorts its examples of a label into."""
    filter_share: float = setting(0.5, above=0, at_most=1)
    """filter_round: share of the frequencies kept along each axis of the gradient, from the lowest on."""
    filter_cosine: float = setting(0.4, at_least=-1, at_most=1)
    """filter_round: a group is left out if the cosine between it and the largest group of its label is below this."""


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
    return _unit(np.where(np.isfinite(flat).all(axis=1, keepdims=True), flat, 0))


def corner(tokens: int, width: int, share: float) -> tuple[int, int]:
    """Return how many frequencies are kept along the axes of V = `tokens` and D = `width`."""
    return max(1, round(share * tokens)), max(1, round(share * width))


def local_groups(features: np.ndarray, most: int) -> np.ndarray:
    """Return the group of each of a client's examples of one label `[n]` int64, from 0.

    Args:
        features: `[n, F]` float32, of unit norm.
        most: groups.
    """
    return _agglomerate(features, number=most)


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClientGroups:
    """The m groups of all clients, of one label."""

    means: np.ndarray
    """`[m, F]` float32, mean directions; zeros for a group without one."""
    examples: np.ndarray
    """`[m]` int64, in each."""
    clients: np.ndarray
    """`[m]` int64, whose it is."""


def global_groups(found: ClientGroups, num_clients: int, cosine: float) -> list[Group]:
    """Sort the groups of all clients of one label, the largest first; those without a direction are left aside.

    A group is odd if it is far from the largest one of its label, is found on at least half of all clients, no one of
    which has most of it, and is no main part of the label.

    Args:
        found: by the clients.
        num_clients: of all clients, also those without an example of the label.
        cosine: below which a group is far from the largest one.
    """
    places = np.flatnonzero(found.means.any(axis=1))
    labels = _agglomerate(found.means[places], distance=SAME_GROUP)
    total, sizes = int(found.examples.sum()), np.bincount(labels, weights=found.examples[places])
    groups: list[Group] = []
    centre = np.zeros(0)
    for label in np.argsort(-sizes, kind="stable"):
        members = places[labels == label]
        counts, homes = found.examples[members], found.clients[members]
        (mean,) = _unit((found.means[members] * counts[:, None]).sum(axis=0, keepdims=True))
        centre = mean if not groups else centre
        angle, examples, clients = float((mean * centre).sum()), int(counts.sum()), len(np.unique(homes))
        largest = int(np.bincount(np.unique(homes, return_inverse=True)[1], weights=counts).max())
        is_spread = 2 * clients >= num_clients and (largest <= MOST_OF_ONE * examples or num_clients == 1)
        is_odd = angle < cosine and is_spread and examples < LARGEST_SHARE * total
        groups.append(Group(members=members, examples=examples, clients=clients, cosine=angle, is_odd=is_odd))
    return groups


def _agglomerate(features: np.ndarray, *, number: int | None = None, distance: float | None = None) -> np.ndarray:
    """Merge the nearest groups, by their mean cosine distance, down to a number or up to a distance; `[n]` int64.

    Of very many, some are merged, and the others join the group whose mean is nearest.
    """
    count = min(len(features), MOST_COMPARED)
    compared = np.unique(np.linspace(0, len(features) - 1, count).astype(np.int64))
    groups = _merge(features[compared], None if number is None else min(number, count), distance)
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


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(norms, TINY)).astype(np.float32)
