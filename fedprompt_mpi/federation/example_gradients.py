"""The gradients of single examples, and the groups into which a client sorts its examples by them.

Legend: n examples of a client, V virtual tokens, D their width, P parameters, F low frequencies, k whitened axes,
L labels.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import score_batch, to_device, to_host
from fedprompt_mpi.federation.cohort import home_ranks
from fedprompt_mpi.federation.rank_training import clients_per_pass
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules.example_groups import centroids, corner, local_groups, low_frequencies, whiten, whole_sum
from fedprompt_mpi.text.batches import collate


class FilterGivenUp(Exception):  # noqa: N818 - nothing went wrong
    """This process was asked to stop, and gives the filter up."""


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


def sort_examples(setup: Setup, vector: Vector) -> tuple[list[SortedExamples], np.ndarray]:
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
    logits = score_batch(setup.backbone, batch, method.inject(clients), torch.arange(len(rows)).to(device))
    torch.nn.functional.cross_entropy(logits, to_device(batch.labels, device), reduction="sum").backward()
    assert own.grad is not None
    return to_host(own.grad)


def features_of(setup: Setup, vector: Vector, rows: np.ndarray) -> np.ndarray:
    """Return the low frequencies of a client's gradients `[n, F]`, in passes as large as those of training.

    Raises:
        FilterGivenUp: if this process was asked to stop.
    """
    client, liveness = setup.config.client, setup.channel.phases.liveness
    at_once = max(1, clients_per_pass(setup) * client.batch_size // client.accumulate)
    order = np.argsort(setup.corpus.train.lengths[rows], kind="stable")
    features = np.empty((len(rows), num_frequencies(setup)), dtype=np.float32)
    for places in (order[at : at + at_once] for at in range(0, len(order), at_once)):
        gradients = example_gradients(setup, vector, rows[places])
        features[places] = low_frequencies(gradients, setup.config.federation.filter_share)
        liveness.step()
        if liveness.stop.requested:
            raise FilterGivenUp
    return features


def num_frequencies(setup: Setup) -> int:
    """Return F."""
    shape = setup.config.prompt.num_virtual_tokens, setup.backbone.geometry.embedding_width
    return math.prod(corner(*shape, setup.config.federation.filter_share))
