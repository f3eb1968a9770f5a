"""Which examples are poison: what the clients and the server tell each other about it. See `example_filter`.

Legend: K clients, R ranks, m groups of all clients, F low frequencies, L labels, G kinds.
"""

import dataclasses

import numpy as np

from fedprompt_mpi.federation.example_gradients import SortedExamples, num_frequencies
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules import example_kinds as kinds
from fedprompt_mpi.rules.example_groups import (
    MOST_GROWTH,
    PARTINGS,
    ClientGroups,
    Group,
    global_groups,
    may_be_poison,
    nearer_to_odd,
    sums_in_two,
    unit,
)
from fedprompt_mpi.rundir.filtered import GroupRecord

HEADER = np.dtype([("client", "<i4"), ("label", "<i4"), ("examples", "<i8")])
"""What is told of a group beside its centroid."""
COUNTS = np.dtype([("client", "<i4"), ("label", "<i4"), ("examples", "<i8", kinds.KINDS)])
"""A client's examples of a label, by kind."""


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


def judge_groups(
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
    counts = _of_each_rank(setup, sum(len(part.means) for part in own))
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


def judge_kinds(
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
        nearest = [kinds_by(part, part.label) for part in own]
        for part, own_kinds, row in zip(own, nearest, counts, strict=True):
            row["client"], row["label"], row["examples"] = part.client, part.label, kinds.count(own_kinds)
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

    rows = _of_each_rank(setup, len(own))
    channel.consult(counts, rows, answer, is_odd)
    traffic.up += int(rows.sum()) * COUNTS.itemsize
    traffic.down += traffic.clients * is_odd.nbytes
    for part, own_kinds in zip(own, nearest, strict=True):
        part.is_odd = is_odd[places[part.label], own_kinds].astype(bool)
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
    without. Where the two are not apart, the odd part grows without end; then what was odd before stays so. Sums over
    clients travel, and in the end how many odd examples each client has.
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


def _of_each_rank(setup: Setup, number: int) -> np.ndarray:
    """Return a whole number of each rank `[R]` int64, on every rank."""
    numbers = np.zeros(setup.channel.size)
    numbers[setup.channel.rank] = number
    return setup.channel.sum(numbers).astype(np.int64)


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
