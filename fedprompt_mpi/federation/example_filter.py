"""The example filter: clients leave out examples that the server, from the centroids of their gradients, calls poison.

A client computes the gradient of the virtual tokens for each of its examples and sorts these into groups. Only the
groups' centroids go to the server, which answers with a verdict on each. See `rules.example_groups`.

Legend: n examples of a client, m groups of all clients, V virtual tokens, D their width, F low frequencies, N rows of
the training table.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import score_batch, to_device, to_host
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.federation.rank_training import MOST_TOKENS_IN_A_PASS
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules.example_groups import centroids, corner, global_groups, local_groups, low_frequencies
from fedprompt_mpi.rundir.filtered import FilterRecord, GroupRecord, LeftOut
from fedprompt_mpi.text.batches import collate


def example_gradients(setup: Setup, vector: Vector, rows: np.ndarray) -> np.ndarray:
    """Return the gradient of each example's loss by the virtual tokens `[n, V, D]` float32.

    The examples go through the PLM as if each were a client of its own, many in one pass.

    Args:
        setup: PLM, method, data.
        vector: `[P]` float32, where the gradient is taken.
        rows: `[n]` int64 of the training table.
    """
    table, method, device = setup.corpus.train, setup.method, setup.backbone.device
    shared = method.layout.views(to_device(vector, device))
    gradients = np.empty((len(rows), *shared["virtual_tokens"].shape), dtype=np.float32)
    at_once = max(1, MOST_TOKENS_IN_A_PASS // (setup.config.model.max_length + gradients.shape[1]))
    order = np.argsort(table.lengths[rows], kind="stable")
    for places in (order[at : at + at_once] for at in range(0, len(order), at_once)):
        own = shared["virtual_tokens"].detach().repeat(len(places), 1, 1).requires_grad_()
        clients = [{**shared, "virtual_tokens": tokens} for tokens in own]
        batch = collate(table, rows[places])
        logits = score_batch(setup.backbone, batch, method, clients, torch.arange(len(places)).to(device))
        labels = to_device(batch.labels, device)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        assert own.grad is not None
        gradients[places] = to_host(own.grad)
        setup.channel.phases.liveness.step()
    return gradients


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
    """
    channel, corpus, start = setup.channel, setup.corpus, time.perf_counter()
    channel.phases.liveness.enter("filter", round_)
    own = list(_sort_own(setup, vector))
    verdicts, groups, size = _judge(setup, own)
    left_out = np.zeros(len(corpus.train))
    for part, is_odd in zip(own, verdicts, strict=True):
        left_out[part.rows] = is_odd[part.groups]
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
        bytes_down=sum(group.parts for group in groups),  # a byte for each that a client has sent
        seconds=time.perf_counter() - start,
        **_score(setup, everyone),
    )
    return everyone, record


def rows_left_out(setup: Setup, record: FilterRecord | None) -> np.ndarray:
    """Return which rows of the training table a record says are left out `[N]` bool.

    Raises:
        ValueError: if it names a client or an example that there is not.
    """
    corpus, found = setup.corpus, np.zeros(len(setup.corpus.train), dtype=bool)
    for part in record.left_out if record is not None else []:
        if not 0 <= part.client < setup.config.federation.clients:
            raise ValueError(f"left_out names client {part.client}")
        rows, places = corpus.client_rows(part.client), np.array(part.examples, dtype=np.int64)
        if len(places) and not (places.min() >= 0 and places.max() < len(rows)):
            raise ValueError(f"left_out names examples that client {part.client} does not have")
        if len(np.unique(places)) == len(rows):
            raise ValueError(f"left_out names all examples of client {part.client}")
        found[rows[places]] = True
    return found


def _sort_own(setup: Setup, vector: Vector) -> Iterator[SortedExamples]:
    """Sort the examples of this rank's clients into groups, label by label."""
    corpus, options = setup.corpus, setup.config.federation
    for client in np.flatnonzero(home_ranks(options.clients, setup.channel.size) == setup.channel.rank).tolist():
        rows = corpus.client_rows(client)
        features = low_frequencies(example_gradients(setup, vector, rows), options.filter_share)
        labels = corpus.train.labels[rows]
        for label in np.unique(labels).tolist():
            there = labels == label
            groups = local_groups(features[there], options.filter_groups)
            means = centroids(features[there], groups)
            yield SortedExamples(client=client, label=label, rows=rows[there], groups=groups, means=means)
            setup.channel.phases.liveness.alive()


def _judge(setup: Setup, own: list[SortedExamples]) -> tuple[list[np.ndarray], list[GroupRecord], int]:
    """Let the server judge the groups of all clients.

    Returns:
        For each of `own`, which of its groups are odd `[groups]` bool; on rank 0 the groups as the server sorts them,
        and how many bytes clients have sent it.
    """
    channel, options = setup.channel, setup.config.federation
    shape = setup.config.prompt.num_virtual_tokens, setup.backbone.geometry.embedding_width
    frequencies = corner(*shape, options.filter_share)
    kind = np.dtype([("client", "<i4"), ("label", "<i4"), ("examples", "<i8"), ("mean", "<f4", frequencies)])
    sent = np.zeros(sum(len(part.means) for part in own), dtype=kind)
    bounds = np.cumsum([0, *(len(part.means) for part in own)])
    for part, first, last in zip(own, bounds, bounds[1:], strict=False):
        sent["client"][first:last], sent["label"][first:last] = part.client, part.label
        sent["examples"][first:last] = np.bincount(part.groups, minlength=len(part.means))
        sent["mean"][first:last] = part.means.reshape(-1, *frequencies)
    counts = np.zeros(channel.size)
    counts[channel.rank] = len(sent)
    counts = channel.sum(counts).astype(np.int64)
    groups: list[GroupRecord] = []

    def answer(everyone: np.ndarray) -> np.ndarray:
        is_odd = np.zeros(len(everyone), dtype=np.uint8)
        for label in np.unique(everyone["label"]):
            there = np.flatnonzero(everyone["label"] == label)
            of_label = everyone[there]
            means = of_label["mean"].reshape(len(there), -1)
            for found in global_groups(means, of_label["examples"], of_label["client"], options.filter_cosine):
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
        return is_odd

    told = np.zeros(int(counts.sum()), dtype=np.uint8)
    everyone = channel.consult(sent, counts, answer, told)
    first = int(counts[: channel.rank].sum())
    verdicts = np.split(told[first : first + len(sent)].astype(bool), bounds[1:-1])
    return verdicts[: len(own)], groups, everyone.nbytes


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
