"""Partition of the examples: each example belongs to exactly one client, and no client is empty.

Legend: N examples, K clients, C classes.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.config import FederationConfig, SettingsError
from fedprompt_mpi.rules.registry import partitions


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Client -> its sorted example indices; disjoint, complete, none empty."""

    indices: tuple[np.ndarray, ...]

    def class_counts(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Return `[K, C]` int64: how many examples of each class each client holds."""
        return np.stack([np.bincount(labels[own], minlength=num_classes) for own in self.indices])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToDealOut:
    """The examples that a partition deals out, and what it may go by."""

    labels: np.ndarray
    """`[N]` int64."""
    users: Sequence[str] | None
    """`[N]` names of the natural clients, if the task has a column of them."""
    clients: int
    """K."""


def partition(config: FederationConfig, labels: np.ndarray, users: Sequence[str] | None, seed: int) -> Partition:
    """Split the training examples among the clients, as `federation.partition` says.

    Args:
        config: kind, number of clients, alpha.
        labels: `[N]` int64.
        users: `[N]` names of the natural clients; for `natural` only.
        seed: the run's seed.

    Raises:
        SettingsError: if there are fewer examples, or under `natural` fewer users, than clients; or if the parts are
            not disjoint and complete, or one is empty.
    """
    rng = seeds.generator(seed, f"partition {config.partition}")
    clients, count = config.clients, len(labels)
    if count < clients:
        raise SettingsError(
            f"federation.clients is {clients} but there are only {count} training examples: have fewer clients"
        )
    deal = partitions[config.partition]
    parts = [np.sort(part) for part in deal(ToDealOut(labels=labels, users=users, clients=clients), config, rng)]
    if len(parts) != clients or not all(map(len, parts)):
        raise SettingsError(
            f"federation.partition {config.partition} made {len(parts)} parts, {sum(not len(part) for part in parts)} "
            f"of them empty, for {clients} clients: each must have an example"
        )
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(count)):
        raise SettingsError(
            f"federation.partition {config.partition} does not give each of the {count} examples to one client"
        )
    return Partition(indices=tuple(part.astype(np.int64) for part in parts))


@partitions.register("iid")
def iid(data: ToDealOut, options: FederationConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal out at random, in parts whose sizes differ by at most one.

    Args:
        data: examples and number of clients.
        options: the section `federation` of the settings.
        rng: the only source of randomness.

    Returns:
        K arrays of places in the data `[.]` int64: disjoint, complete, none empty.
    """
    return np.array_split(rng.permutation(len(data.labels)), data.clients)


@partitions.register("quantity")
def quantity(data: ToDealOut, options: FederationConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Deal out at random, in sizes in proportion to a draw from Dirichlet(alpha): labels are not skewed.

    Each client gets one example before the others are distributed.

    References:
        Zhao et al., FedPrompt, 2022, arXiv:2208.12268, Section 3 (its non-IID).
    """
    count, clients = len(data.labels), data.clients
    sizes = 1 + _sizes(count - clients, rng.dirichlet(np.full(clients, options.alpha)))
    return np.split(rng.permutation(count), np.cumsum(sizes)[:-1])


def _sizes(count: int, proportions: np.ndarray) -> np.ndarray:
    """Round `count * proportions` to integers that sum to `count` (largest remainders)."""
    exact = count * proportions
    sizes = np.floor(exact).astype(np.int64)
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1
    return sizes


@partitions.register("label")
def by_label(data: ToDealOut, options: FederationConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Split each class in proportion to its own draw from Dirichlet(alpha).

    A client without examples takes a random one from the client that has the most.

    References:
        Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, ICML 2019, arXiv:1905.12022.
        Li et al., Federated Learning on Non-IID Data Silos, ICDE 2022, arXiv:2102.02079.
    """
    labels, clients, alpha = data.labels, data.clients, options.alpha
    portions: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        sizes = _sizes(len(own), rng.dirichlet(np.full(clients, alpha)))
        for client, portion in enumerate(np.split(own, np.cumsum(sizes)[:-1])):
            portions[client].append(portion)
    parts = [rng.permutation(np.concatenate(own)) for own in portions]
    for client in range(clients):
        if len(parts[client]) == 0:
            richest = max(range(clients), key=lambda other: len(parts[other]))
            parts[client], parts[richest] = parts[richest][:1], parts[richest][1:]
    return parts


@partitions.register("label_shares")
def by_label_shares(data: ToDealOut, options: FederationConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Give each client as many examples, by its own draw of class shares from Dirichlet(alpha p).

    p are the classes' shares of the data; when a class is used up, the others take its place.

    References:
        Hsu et al., Measuring the Effects of Non-Identical Data Distribution, 2019, arXiv:1909.06335, Section 2.
    """
    labels, clients, alpha = data.labels, data.clients, options.alpha
    classes, counts = np.unique(labels, return_counts=True)
    waiting = [rng.permutation(np.flatnonzero(labels == label)) for label in classes]
    prior, parts = counts / counts.sum(), []
    for size in map(len, np.array_split(labels, clients)):
        shares, own = rng.dirichlet(np.maximum(alpha * prior, np.finfo(float).tiny)), []
        while size:
            left = np.array(list(map(len, waiting)))
            open_shares = np.where(left > 0, shares, 0.0)
            if open_shares.sum() == 0:  # all of its classes are used up
                open_shares = left.astype(float)
            taken = np.minimum(rng.multinomial(size, open_shares / open_shares.sum()), left)
            for place, number in enumerate(taken):
                own.append(waiting[place][:number])
                waiting[place] = waiting[place][number:]
            size -= int(taken.sum())
        parts.append(np.concatenate(own))
    return parts


@partitions.register("natural")
def by_user(data: ToDealOut, options: FederationConfig, rng: np.random.Generator) -> list[np.ndarray]:
    """Give whole users, in random order, to the client that has the fewest examples so far.

    Raises:
        SettingsError: if the task has no users, or fewer than clients.
    """
    users, clients = data.users, data.clients
    if users is None:
        raise SettingsError("federation.partition is natural but the task has no user column: name it with task.user")
    names, owner = np.unique(np.asarray(users), return_inverse=True)
    if len(names) < clients:
        raise SettingsError(
            f"federation.partition is natural and federation.clients is {clients}, "
            f"but task.user names only {len(names)} users: have at most {len(names)} clients"
        )
    sizes = np.bincount(owner)
    client_of = np.empty(len(names), dtype=np.int64)
    held = np.zeros(clients, dtype=np.int64)
    for user in rng.permutation(len(names)):
        client_of[user] = int(held.argmin())
        held[client_of[user]] += sizes[user]
    return [np.flatnonzero(client_of[owner] == client) for client in range(clients)]


MOST_LINES = 50
"""Clients that a table lists one by one."""
COLUMNS, NARROWEST = 80, 8
"""Of a terminal, and of a class in it."""


def format_table(counts: np.ndarray, label_words: Sequence[str], poisoned: Sequence[int]) -> str:
    """Return a partition as a table: one line per client, with its examples of each class and its poisoned ones.

    Of more than `MOST_LINES` clients the table has the quantiles instead, each column's own.

    Args:
        counts: `[K, C]` clean examples by client and class.
        label_words: C names.
        poisoned: K counts of poisoned examples.
    """
    beside = 26 if len(counts) > MOST_LINES else 16 + (18 if any(poisoned) else 0)
    counts, label_words, width = _fitted(counts, label_words, COLUMNS - beside)
    if len(counts) > MOST_LINES:
        return _quantiles(counts, label_words, poisoned, width)
    lines = ["client" + f"{'examples':>10}" + "".join(f"{word:>{width}}" for word in label_words)]
    for client, (row, extra) in enumerate(zip(counts, poisoned, strict=True)):
        mark = f"   poisoned: {extra}" if extra else ""
        lines.append(f"{client:6d}{row.sum():10d}" + "".join(f"{n:{width}d}" for n in row) + mark)
    return "\n".join(lines)


def _fitted(counts: np.ndarray, names: Sequence[str], room: int) -> tuple[np.ndarray, Sequence[str], int]:
    """Return counts, names and width of columns that fit: long names are cut, of many classes some are summed up."""
    most = room // NARROWEST
    if len(names) > most:
        counts = np.column_stack([counts[:, : most - 1], counts[:, most - 1 :].sum(axis=1)])
        names = [*names[: most - 1], "others"]
    width = min(max(8, *(len(name) + 2 for name in names)), room // len(names))
    return counts, [name if len(name) <= width - 2 else f"{name[: width - 3]}." for name in names], width


def _quantiles(counts: np.ndarray, label_words: Sequence[str], poisoned: Sequence[int], width: int) -> str:
    columns = np.column_stack([counts.sum(axis=1), counts])
    head = f"{len(counts):,} clients"
    lines = [f"{head:<16}{'examples':>10}" + "".join(f"{word:>{width}}" for word in label_words)]
    for name, share in (
        ("fewest", 0),
        ("5 % have up to", 0.05),
        ("median", 0.5),
        ("95 % have up to", 0.95),
        ("most", 1),
    ):
        row = np.quantile(columns, share, axis=0, method="lower").tolist()
        lines.append(f"{name:<16}{row[0]:10d}" + "".join(f"{n:{width}d}" for n in row[1:]))
    if any(poisoned):
        lines.append(f"poisoned: {sum(poisoned):,} examples of {np.count_nonzero(poisoned):,} clients")
    return "\n".join(lines)
