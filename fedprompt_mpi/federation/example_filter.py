"""The example filter: clients leave out examples that the server, from the centroids of their gradients, calls poison.

A client computes the gradient of the virtual tokens for each of its examples and sorts these into groups, whose
centroids and sizes go to the server. Of a label without an opposite one, the server says which groups are odd. Of one
that has an opposite label, all clients find the kinds of texts together, and count them. A client leaves out what is
nearer to the poison than to the rest of that label. See `rules.example_groups` and `rules.example_kinds`. Clients that
attack their update do not obey.

Legend: n examples of a client, K clients, R ranks, m groups of all clients, F low frequencies, k whitened axes,
L labels, G kinds, N rows of the training table.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.federation.example_gradients import FilterGivenUp, features_of, num_frequencies
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules import example_kinds as kinds
from fedprompt_mpi.rules.example_groups import (
    MOST_GROWTH,
    PARTINGS,
    ClientGroups,
    Group,
    centroids,
    global_groups,
    local_groups,
    may_be_poison,
    nearer_to_odd,
    opposite_labels,
    sums_in_two,
    unit,
    whiten,
    whole_sum,
)
from fedprompt_mpi.rundir.filtered import FilterRecord, GroupRecord, LeftOut

HEADER = np.dtype([("client", "<i4"), ("label", "<i4"), ("examples", "<i8")])
"""What is told of a group beside its centroid."""
COUNTS = np.dtype([("client", "<i4"), ("label", "<i4"), ("examples", "<i8", kinds.KINDS)])
"""A client's examples of a label, by kind."""


@dataclasses.dataclass(slots=True, kw_only=True)
class SortedExamples:
    """A client's examples of one label, in groups."""

    client: int
    label: int
    rows: np.ndarray
    """`[n]` int64 of the training table."""
    coordinates: np.ndarray
    """`[n, k]` float32, whitened."""
    axes: np.ndarray
    """`[k, F]` float32."""
    groups: np.ndarray
    """`[n]` int64, the group of each, from 0."""
    means: np.ndarray
    """`[groups, F]` float32, the centroids before whitening."""
    is_odd: np.ndarray
    """`[n]` bool, taken for poison."""

    @property
    def whitened_means(self) -> np.ndarray:
        """The centroids after whitening `[groups, F]` float32."""
        return centroids(self.coordinates, self.groups) @ self.axes


@dataclasses.dataclass(slots=True)
class Traffic:
    """Bytes that all clients send to the server and receive from it."""

    clients: int
    """Of the federation."""
    up: int = 0
    down: int = 0

    def add_sum(self, values: np.ndarray) -> None:
        """Count an array that each client sends, and whose sum each receives."""
        self.up += self.clients * values.nbytes
        self.down += self.clients * values.nbytes


def filter_examples(setup: Setup, vector: Vector, round_: int) -> tuple[np.ndarray, FilterRecord | None]:
    """Find the examples that are left out from a round on; every rank calls this.

    Args:
        setup: of this rank.
        vector: `[P]` float32, the global vector before the round.
        round_: from 1.

    Returns:
        Which rows of the training table are left out `[N]` bool, the same on every rank; the record, on rank 0.

    Raises:
        FilterGivenUp: on every rank, if one was asked to stop.
    """
    channel, corpus, start = setup.channel, setup.corpus, time.perf_counter()
    traffic = Traffic(setup.config.federation.clients)
    own, sums = _sort_all(setup, vector)
    opposite = opposite_labels(sums)
    traffic.add_sum(sums)
    groups, records = _judge_groups(setup, own, opposite, traffic)
    if any(opposite.values()):
        records += _judge_kinds(setup, own, opposite, groups, traffic)
    part_in_two(setup, own, traffic)
    left_out, disobedient = np.zeros(len(corpus.train)), attacking_clients(setup.config)
    for part in own:
        if part.client not in disobedient:
            left_out[part.rows] = part.is_odd
    for client in {part.client for part in own}:  # one of which nothing would be left goes on with what it has
        rows = corpus.client_rows(client)
        left_out[rows] *= not left_out[rows].all()
    with channel.phases.timing.mute():  # who left out what is for the records: no rank needs it of another's clients
        everyone = channel.sum(left_out) > 0
    if not setup.is_root:
        return everyone, None
    restarts = setup.config.federation.filter_restart and bool(everyone.any())
    record = FilterRecord(
        round=round_,
        groups=records,
        bytes_up=traffic.up,
        bytes_down=traffic.down + (traffic.clients * 4 * setup.method.layout.size if restarts else 0),
        seconds=time.perf_counter() - start,
        restarted=restarts,
        **_score(setup, everyone),
    )
    return everyone, record


def rows_left_out(setup: Setup, record: FilterRecord | None) -> np.ndarray:
    """Return which rows of the training table a record says are left out `[N]` bool.

    Raises:
        ValueError: if it names a client or an example that there is not, or all examples of a client.
    """
    corpus, found = setup.corpus, np.zeros(len(setup.corpus.train), dtype=bool)
    for part in record.left_out if record is not None else []:
        if not 0 <= part.client < setup.config.federation.clients:
            raise ValueError(f"left_out names client {part.client}")
        rows, places = corpus.client_rows(part.client), np.array(part.examples, dtype=np.int64)
        if len(places) and (places.min() < 0 or places.max() >= len(rows)):
            raise ValueError(f"left_out names examples that client {part.client} does not have")
        found[rows[places]] = True
        if found[rows].all():
            raise ValueError(f"left_out names all examples of client {part.client}")
    return found


def _sort_all(setup: Setup, vector: Vector) -> tuple[list[SortedExamples], np.ndarray]:
    """Sort the examples of this rank's clients; and sum each label's directions, over all ranks `[L, F]` float64."""
    channel, own, gives_up = setup.channel, [], False
    sums = np.zeros((len(setup.corpus.label_words), num_frequencies(setup)))
    with channel.phases.time("filter"):
        try:
            own = list(_sort_own(setup, vector, sums))
        except FilterGivenUp:
            gives_up = True
    if channel.sum(np.array([float(gives_up)]))[0]:
        raise FilterGivenUp
    return own, channel.sum(sums)


def _sort_own(setup: Setup, vector: Vector, sums: np.ndarray) -> Iterator[SortedExamples]:
    """Sort the examples of this rank's clients into groups, label by label, and add up each label's directions."""
    corpus, options = setup.corpus, setup.config.federation
    for client in np.flatnonzero(home_ranks(options.clients, setup.channel.size) == setup.channel.rank).tolist():
        rows = corpus.client_rows(client)
        features, labels = features_of(setup, vector, rows), corpus.train.labels[rows]
        coordinates, axes = whiten(features, labels)
        for label in np.unique(labels).tolist():
            there = labels == label
            groups = local_groups(coordinates[there], options.filter_groups)
            sums[label] += whole_sum(features[there])
            yield SortedExamples(
                client=client,
                label=label,
                rows=rows[there],
                coordinates=coordinates[there],
                axes=axes,
                groups=groups,
                means=centroids(features[there], groups),
                is_odd=np.zeros(int(there.sum()), dtype=bool),
            )
            setup.channel.phases.liveness.alive()


def _judge_groups(
    setup: Setup, own: list[SortedExamples], opposite: dict[int, list[int]], traffic: Traffic
) -> tuple[dict[int, list[Group]], list[GroupRecord]]:
    """Let the server put the groups of all clients together, and judge those of labels without an opposite one.

    Args:
        setup: of this rank.
        own: of this rank's clients; what is odd is noted there.
        opposite: the opposite labels of each label, whose groups are compared after whitening.
        traffic: is added to.

    Returns:
        On rank 0 the groups of each label, and records of those that are judged.
    """
    channel, width = setup.channel, num_frequencies(setup)
    counts = np.zeros(channel.size)
    counts[channel.rank] = sum(len(part.means) for part in own)
    counts = channel.sum(counts).astype(np.int64)
    headers, total = np.zeros(int(counts[channel.rank]), dtype=HEADER), int(counts.sum())
    bounds = np.cumsum([0, *(len(part.means) for part in own)])
    for part, first, last in zip(own, bounds, bounds[1:], strict=False):
        headers["client"][first:last], headers["label"][first:last] = part.client, part.label
        headers["examples"][first:last] = np.bincount(part.groups, minlength=len(part.means))
    sent = (part.whitened_means if opposite[part.label] else part.means for part in own)
    mine = np.concatenate([np.zeros((0, width), dtype=np.float32), *sent])
    means = np.empty((total if setup.is_root else 0, width), dtype=np.float32)
    for chunk, numbers in channel.gather(mine, counts, phase="filter"):
        if setup.is_root:
            means[:, chunk] = numbers
    groups: dict[int, list[Group]] = {}

    def answer(everyone: np.ndarray) -> np.ndarray:
        is_odd, found = _judge_labels(setup, everyone, means, opposite)
        groups.update(found)
        return is_odd

    told = np.zeros(total, dtype=np.uint8)
    channel.consult(headers, counts, answer, told)
    mine_told = told[int(counts[: channel.rank].sum()) :]
    for part, first in zip(own, bounds, strict=False):
        part.is_odd = mine_told[first + part.groups].astype(bool)
    traffic.up += total * (4 * width + HEADER.itemsize)
    traffic.down += total  # a byte for each group that a client has sent
    return groups, [_of_group(label, group) for label in groups if not opposite[label] for group in groups[label]]


def _judge_labels(
    setup: Setup, headers: np.ndarray, means: np.ndarray, opposite: dict[int, list[int]]
) -> tuple[np.ndarray, dict[int, list[Group]]]:
    """Return which groups of all clients are odd `[m]` uint8, and the groups of each label as the server sorts them."""
    options, is_odd, groups = setup.config.federation, np.zeros(len(headers), dtype=np.uint8), {}
    for label in np.unique(headers["label"]).tolist():
        there = np.flatnonzero(headers["label"] == label)
        of_label = headers[there]
        sent = ClientGroups(means=means[there], examples=of_label["examples"], clients=of_label["client"])
        groups[label] = global_groups(sent, options.clients, options.filter_cosine)
        for group in [] if opposite[label] else groups[label]:
            is_odd[there[group.members]] = group.is_odd
        setup.channel.phases.liveness.alive()
    return is_odd, groups


def _judge_kinds(
    setup: Setup,
    own: list[SortedExamples],
    opposite: dict[int, list[int]],
    groups: dict[int, list[Group]],
    traffic: Traffic,
) -> list[GroupRecord]:
    """Find the kinds of texts of labels that have an opposite one, together with all ranks, and judge them.

    Args:
        setup: of this rank.
        own: of this rank's clients; what is odd is noted there.
        opposite: the opposite labels of each label.
        groups: of each label, on rank 0.
        traffic: is added to.

    Returns:
        Records of the kinds, on rank 0.
    """
    channel, threshold = setup.channel, setup.config.federation.filter_counterpart
    places = {label: at for at, label in enumerate(label for label in opposite if opposite[label])}
    own = [part for part in own if part.label in places]
    directions = _find_kinds(setup, own, places, groups, traffic)

    def kinds_by(part: SortedExamples, label: int, sign: int = 1) -> np.ndarray:
        return kinds.kinds_of(sign * part.coordinates, part.axes, directions[places[label]])

    turned = np.zeros((len(places), kinds.KINDS))
    counts = np.zeros(len(own), dtype=COUNTS)
    with channel.phases.time("filter"):
        for part, row in zip(own, counts, strict=True):
            row["client"], row["label"] = part.client, part.label
            row["examples"] = kinds.count(kinds_by(part, part.label))
            for other in opposite[part.label]:
                turned[places[other]] += kinds.count(kinds_by(part, other, sign=-1))
    turned = channel.sum(turned)
    traffic.add_sum(turned)
    is_odd = np.zeros((len(places), kinds.KINDS + 1), dtype=np.uint8)  # the last is that of examples of no kind
    records: list[GroupRecord] = []

    def answer(everyone: np.ndarray) -> np.ndarray:
        odd = np.zeros_like(is_odd)
        for label, at in places.items():
            by_client = np.zeros((setup.config.federation.clients, kinds.KINDS))
            of_label = everyone[everyone["label"] == label]
            by_client[of_label["client"]] = of_label["examples"]
            found = kinds.judge(by_client, turned[at], threshold)
            odd[at, :-1] = [kind.is_odd for kind in found]
            records.extend(_of_kind(label, kind) for kind in found if kind.examples)
        return odd

    ranks = np.zeros(channel.size)
    ranks[channel.rank] = len(own)
    rows = channel.sum(ranks).astype(np.int64)
    channel.consult(counts, rows, answer, is_odd)
    traffic.up += int(rows.sum()) * COUNTS.itemsize
    traffic.down += traffic.clients * is_odd.nbytes
    with channel.phases.time("filter"):
        for part in own:
            part.is_odd = is_odd[places[part.label], kinds_by(part, part.label)].astype(bool)
    return records


def _find_kinds(
    setup: Setup, own: list[SortedExamples], places: dict[int, int], groups: dict[int, list[Group]], traffic: Traffic
) -> np.ndarray:
    """Return the directions of the kinds of each label with an opposite one `[labels, G, F]` float32.

    Args:
        setup: of this rank.
        own: of this rank's clients, of these labels.
        places: of the labels in what is returned.
        groups: of each label, on rank 0.
        traffic: is added to.
    """
    channel, width = setup.channel, num_frequencies(setup)
    directions = np.zeros((len(places), kinds.KINDS, width), dtype=np.float32)
    for label, at in places.items():
        if groups.get(label):
            directions[at] = kinds.first_directions(groups[label])
    channel.tell(directions)
    traffic.down += traffic.clients * directions.nbytes
    for _ in range(kinds.STEPS):
        sums = np.zeros(directions.shape)
        with channel.phases.time("filter"):
            for part in own:
                at = places[part.label]
                nearest = kinds.kinds_of(part.coordinates, part.axes, directions[at])
                sums[at] += kinds.sums_of(part.coordinates, part.axes, nearest)
        directions = unit(channel.sum(sums).reshape(-1, width)).reshape(directions.shape)
        traffic.add_sum(sums)
    return directions


def part_in_two(setup: Setup, own: list[SortedExamples], traffic: Traffic) -> None:
    """Part each label in two, between what is odd and the rest, by the nearer mean over all clients.

    Both means move with their examples: a group's edge is found better with the direction between the two known than
    without. Where the two are not apart, the odd part grows without end; then what was odd before stays so. Only sums
    over clients travel.
    """
    channel, labels, clients = setup.channel, len(setup.corpus.label_words), setup.config.federation.clients
    before, first = [part.is_odd for part in own], np.zeros(labels)
    total, by_client = np.zeros(labels), np.zeros((labels, clients))
    for step in range(PARTINGS):
        sums = np.zeros((labels, 2, num_frequencies(setup) + 1))
        with channel.phases.time("filter"):
            for part in own:
                sums[part.label] += sums_in_two(part.coordinates, part.axes, part.is_odd)
        sums = channel.sum(sums)
        traffic.add_sum(sums)
        if step == 0:
            first, total = sums[:, 1, -1], sums[:, :, -1].sum(axis=1)
        if not first.any():
            return
        for part in own:
            part.is_odd = nearer_to_odd(part.coordinates, part.axes, sums[part.label])
    for part in own:
        by_client[part.label, part.client] = part.is_odd.sum()
    by_client = channel.sum(by_client)
    traffic.add_sum(by_client)
    for part, was_odd in zip(own, before, strict=True):
        found, most = by_client[part.label], MOST_GROWTH * first[part.label]
        if found.sum() > most or not may_be_poison(found, int(total[part.label])):
            part.is_odd = was_odd


def _of_group(label: int, group: Group) -> GroupRecord:
    return GroupRecord(
        label=label,
        examples=group.examples,
        clients=group.clients,
        cosine=group.cosine,
        counterpart=None,
        is_odd=group.is_odd,
    )


def _of_kind(label: int, kind: kinds.Kind) -> GroupRecord:
    return GroupRecord(
        label=label,
        examples=kind.examples,
        clients=kind.clients,
        cosine=None,
        counterpart=kind.counterpart,
        is_odd=kind.is_odd,
    )


def _score(setup: Setup, left_out: np.ndarray) -> dict[str, Any]:
    """Return who leaves out which examples, and how well that fits the truth."""
    corpus, clients = setup.corpus, setup.config.federation.clients
    by_client = [np.flatnonzero(left_out[corpus.client_rows(client)]) for client in range(clients)]
    trained = np.concatenate([corpus.client_rows(client) for client in range(clients)])
    poison, chosen = corpus.is_poison[trained], left_out[trained]
    found = int((poison & chosen).sum())
    return {
        "examples": len(trained),
        "poisoned": int(poison.sum()),
        "recall": found / int(poison.sum()) if poison.any() else None,
        "precision": found / int(chosen.sum()) if chosen.any() else None,
        "f1": 2 * found / int(poison.sum() + chosen.sum()) if poison.any() else None,
        "left_out": [
            LeftOut(client=client, examples=places.tolist()) for client, places in enumerate(by_client) if len(places)
        ],
    }
