"""The example filter: clients leave out examples that the server, from the centroids of their gradients, calls poison.

A client computes the gradient of the virtual tokens for each of its examples and sorts these into groups. The groups'
centroids, labels and sizes go to the server, which answers with a verdict on each. See `rules.example_groups`. Clients
that attack their update do not obey.

Legend: n examples of a client, m groups of all clients, V virtual tokens, D their width, F low frequencies, N rows of
the training table.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.adversary import attacking_clients
from fedprompt_mpi.federation.client_training import score_batch, to_device, to_host
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.federation.rank_training import clients_per_pass
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules.example_groups import (
    ClientGroups,
    centroids,
    corner,
    global_groups,
    local_groups,
    low_frequencies,
)
from fedprompt_mpi.rundir.filtered import FilterRecord, GroupRecord, LeftOut
from fedprompt_mpi.text.batches import collate

HEADER = np.dtype([("client", "<i4"), ("label", "<i4"), ("examples", "<i8")])
"""What is told of a group beside its centroid."""


class FilterGivenUp(Exception):  # noqa: N818 - nothing went wrong
    """This process was asked to stop, and gives the filter up."""


def example_gradients(setup: Setup, vector: Vector, rows: np.ndarray) -> np.ndarray:
    """Return the gradient of each example's loss by the virtual tokens `[n, V, D]` float32.

    The examples go through the PLM in one pass, as if each were a client of its own.

    Args:
        setup: PLM, method, data.
        vector: `[P]` float32, where the gradient is taken.
        rows: `[n]` int64 of the training table.
    """
    method, device = setup.method, setup.backbone.device
    shared = method.layout.views(to_device(vector, device))
    own = shared["virtual_tokens"].detach().repeat(len(rows), 1, 1).requires_grad_()
    clients = [{**shared, "virtual_tokens": tokens} for tokens in own]
    batch = collate(setup.corpus.train, rows)
    logits = score_batch(setup.backbone, batch, method, clients, torch.arange(len(rows)).to(device))
    torch.nn.functional.cross_entropy(logits, to_device(batch.labels, device), reduction="sum").backward()
    assert own.grad is not None
    return to_host(own.grad)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SortedExamples:
    """A client's examples of one label, in groups."""

    client: int
    label: int
    rows: np.ndarray
    """`[n]` int64 of the training table."""
    groups: np.ndarray
    """`[n]` int64, the group of each, from 0."""
    means: np.ndarray
    """`[groups, F]` float32, the centroids."""


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
    own, gives_up = [], False
    with channel.phases.time("filter", round_):
        try:
            own = list(_sort_own(setup, vector))
        except FilterGivenUp:
            gives_up = True
    counts = np.zeros(channel.size + 1)
    counts[channel.rank], counts[-1] = sum(len(part.means) for part in own), gives_up
    counts = channel.sum(counts)
    if counts[-1]:
        raise FilterGivenUp
    verdicts, groups, size = _judge(setup, own, counts[:-1].astype(np.int64))
    left_out, disobedient = np.zeros(len(corpus.train)), attacking_clients(setup.config)
    for part, is_odd in zip(own, verdicts, strict=True):
        left_out[part.rows] = is_odd[part.groups] & (part.client not in disobedient)
    for client in {part.client for part in own}:  # one of which nothing would be left goes on with what it has
        rows = corpus.client_rows(client)
        left_out[rows] *= not left_out[rows].all()
    with channel.phases.timing.mute():  # who left out what is for the records: no rank needs it of another's clients
        everyone = channel.sum(left_out) > 0
    if not setup.is_root:
        return everyone, None
    record = FilterRecord(
        round=round_,
        groups=groups,
        bytes_up=size,
        bytes_down=int(counts[:-1].sum()),  # a byte for each group that a client has sent
        seconds=time.perf_counter() - start,
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


def _sort_own(setup: Setup, vector: Vector) -> Iterator[SortedExamples]:
    """Sort the examples of this rank's clients into groups, label by label."""
    corpus, options = setup.corpus, setup.config.federation
    for client in np.flatnonzero(home_ranks(options.clients, setup.channel.size) == setup.channel.rank).tolist():
        rows = corpus.client_rows(client)
        features = _features(setup, vector, rows)
        labels = corpus.train.labels[rows]
        for label in np.unique(labels).tolist():
            there = labels == label
            groups = local_groups(features[there], options.filter_groups)
            means = centroids(features[there], groups)
            yield SortedExamples(client=client, label=label, rows=rows[there], groups=groups, means=means)
            setup.channel.phases.liveness.alive()


def _features(setup: Setup, vector: Vector, rows: np.ndarray) -> np.ndarray:
    """Return the low frequencies of a client's gradients `[n, F]`, in passes as large as those of training.

    Raises:
        FilterGivenUp: if this process was asked to stop.
    """
    client, liveness = setup.config.client, setup.channel.phases.liveness
    at_once = max(1, clients_per_pass(setup) * client.batch_size // client.accumulate)
    order = np.argsort(setup.corpus.train.lengths[rows], kind="stable")
    features = np.empty((len(rows), _frequencies(setup)), dtype=np.float32)
    for places in (order[at : at + at_once] for at in range(0, len(order), at_once)):
        gradients = example_gradients(setup, vector, rows[places])
        features[places] = low_frequencies(gradients, setup.config.federation.filter_share)
        liveness.step()
        if liveness.stop.requested:
            raise FilterGivenUp
    return features


def _frequencies(setup: Setup) -> int:
    """Return F."""
    shape = setup.config.prompt.num_virtual_tokens, setup.backbone.geometry.embedding_width
    return math.prod(corner(*shape, setup.config.federation.filter_share))


def _judge(
    setup: Setup, own: list[SortedExamples], counts: np.ndarray
) -> tuple[list[np.ndarray], list[GroupRecord], int]:
    """Let the server judge the groups of all clients.

    Args:
        setup: of this rank.
        own: of this rank's clients.
        counts: `[R]` int64, groups of each rank.

    Returns:
        For each of `own`, which of its groups are odd `[groups]` bool; on rank 0 the groups as the server sorts them,
        and how many bytes clients have sent it.
    """
    channel, frequencies = setup.channel, _frequencies(setup)
    headers, total = np.zeros(int(counts[channel.rank]), dtype=HEADER), int(counts.sum())
    bounds = np.cumsum([0, *(len(part.means) for part in own)])
    for part, first, last in zip(own, bounds, bounds[1:], strict=False):
        headers["client"][first:last], headers["label"][first:last] = part.client, part.label
        headers["examples"][first:last] = np.bincount(part.groups, minlength=len(part.means))
    mine = np.concatenate([np.zeros((0, frequencies), dtype=np.float32), *(part.means for part in own)])
    means = np.empty((total if setup.is_root else 0, frequencies), dtype=np.float32)
    for chunk, numbers in channel.gather(mine, counts, phase="filter"):
        if setup.is_root:
            means[:, chunk] = numbers
    groups: list[GroupRecord] = []

    def answer(everyone: np.ndarray) -> np.ndarray:
        is_odd, found = _judge_labels(setup, everyone, means)
        groups.extend(found)
        return is_odd

    told = np.zeros(total, dtype=np.uint8)
    channel.consult(headers, counts, answer, told)
    first = int(counts[: channel.rank].sum())
    verdicts = np.split(told[first : first + len(headers)].astype(bool), bounds[1:-1])
    return verdicts[: len(own)], groups, means.nbytes + total * HEADER.itemsize


def _judge_labels(setup: Setup, headers: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, list[GroupRecord]]:
    """Return which groups of all clients are odd `[m]` uint8, and the groups as the server sorts them."""
    options, is_odd, groups = setup.config.federation, np.zeros(len(headers), dtype=np.uint8), []
    for label in np.unique(headers["label"]):
        there = np.flatnonzero(headers["label"] == label)
        of_label = headers[there]
        sent = ClientGroups(means=means[there], examples=of_label["examples"], clients=of_label["client"])
        for found in global_groups(sent, options.clients, options.filter_cosine):
            is_odd[there[found.members]] = found.is_odd
            groups.append(
                GroupRecord(
                    label=int(label),
                    examples=found.examples,
                    clients=found.clients,
                    parts=len(found.members),
                    cosine=found.cosine,
                    left_out=found.is_odd,
                )
            )
        setup.channel.phases.liveness.alive()
    return is_odd, groups


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
