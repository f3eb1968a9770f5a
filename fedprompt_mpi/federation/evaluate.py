"""Accuracy and attack success rate: of the global prompt, the test set sharded over all ranks, and of clients' own.

The attack success rate is the share of triggered test examples of non-target classes that are taken for the target.

Legend: N test examples, C classes.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from fedprompt_mpi.comm.channel import Channel
from fedprompt_mpi.comm.stop import is_requested
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.client import score_batch, to_device
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.plm.backbone import Backbone
from fedprompt_mpi.plm.methods import Method
from fedprompt_mpi.text.batches import collate, evaluation_batches
from fedprompt_mpi.text.corpus import Corpus
from fedprompt_mpi.text.tokens import TokenTable


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a prompt is worth on the test set; rates are in [0, 1]."""

    accuracy: float
    macro_f1: float
    loss: float | None
    """None if it is not finite."""
    attack_success_rate: float | None
    """None where no trigger is set."""


def evaluate(
    config: RunConfig,
    channel: Channel,
    backbone: Backbone,
    method: Method,
    vector: np.ndarray,
    corpus: Corpus,
    shard: tuple[int, int] | None,
) -> Evaluation | None:
    """Evaluate the global vector `[P]`, each rank its shard (None: none of it).

    Returns:
        The rates, the same on every rank; None on all of them if one was asked to stop before it was done.
    """
    classes = len(corpus.label_words)
    counts = np.zeros((2, classes * classes + 1))
    is_done = True

    def look_up() -> None:
        channel.alive()
        if is_requested():
            raise _GivenUp

    with channel.timing.phase("evaluate"):  # until the slowest rank is done
        try:
            if shard is not None:
                counts = _count_both(backbone, method, vector, corpus, shard, look_up)
        except _GivenUp:
            is_done = False
        *summed, given_up = channel.sum(np.append(counts.ravel(), 0.0 if is_done else 1.0))
    if given_up:
        return None
    clean, triggered = np.reshape(summed, counts.shape)
    return summarise(clean, triggered, classes, config.poison.target)


class _GivenUp(Exception):  # noqa: N818 - nothing went wrong
    """This rank was asked to stop in the middle."""


def evaluate_clients(
    config: RunConfig,
    channel: Channel,
    backbone: Backbone,
    method: Method,
    vector: np.ndarray,
    deltas: np.ndarray,
    corpus: Corpus,
    cohort: Cohort,
) -> list[Evaluation]:
    """Evaluate each client's own prompt after its local training, on its own rank.

    Args:
        config: the target.
        channel: the ranks.
        backbone: the PLM.
        method: what vectors mean.
        vector: `[P]` float32, the global vector that the clients started from.
        deltas: `[k, P]` float32 of this rank, before any attack on the update or noise.
        corpus: the test sets.
        cohort: K clients of the round.

    Returns:
        K evaluations, in client order, on every rank.
    """
    classes = len(corpus.label_words)
    counts = np.zeros((len(cohort.clients), 2, classes * classes + 1))
    own = [position for position, rank in enumerate(cohort.ranks) if rank == channel.rank]
    with channel.timing.phase("evaluate_clients"):
        for position, delta in zip(own, deltas[len(deltas) - len(own) :], strict=True):  # the server's comes first
            counts[position] = _count_both(backbone, method, vector + delta, corpus, (0, 1), channel.alive)
        counts = channel.sum(counts)
    return [summarise(clean, triggered, classes, config.poison.target) for clean, triggered in counts]


def _count_both(
    backbone: Backbone,
    method: Method,
    vector: np.ndarray,
    corpus: Corpus,
    shard: tuple[int, int],
    alive: Callable[[], None],
) -> np.ndarray:
    """Count the answers to the clean (row 0) and the triggered test set."""
    classes = len(corpus.label_words)
    return np.stack(
        [count(backbone, method, vector, table, classes, shard, alive) for table in (corpus.test, corpus.triggered)]
    )


@torch.no_grad()
def count(
    backbone: Backbone,
    method: Method,
    vector: np.ndarray,
    table: TokenTable,
    num_classes: int,
    shard: tuple[int, int],
    alive: Callable[[], None],
) -> np.ndarray:
    """Score this rank's share of a table.

    Args:
        backbone: the PLM.
        method: what `vector` means.
        vector: `[P]` float32.
        table: N examples.
        num_classes: C.
        shard: (index, count): this rank takes every count-th batch from index.
        alive: called after each batch.

    Returns:
        `[C * C + 1]` float64: the confusion matrix (row: label, column: answer) and the summed loss, to be added
        up over the ranks.
    """
    confusion = np.zeros((num_classes, num_classes))
    loss = 0.0
    clients = method.leaves(to_device(vector, backbone.device)[None])
    virtual = method.config.num_virtual_tokens if method.adds_tokens else 0
    index, shards = shard
    for rows in evaluation_batches(table, virtual)[index::shards]:
        batch = collate(table, rows)
        logits = score_batch(backbone, batch, method, clients, None).cpu()
        labels = torch.from_numpy(batch.labels)
        loss += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
        np.add.at(confusion, (batch.labels, logits.argmax(dim=1).numpy()), 1)
        alive()
    return np.append(confusion.ravel(), loss)


def summarise(clean: np.ndarray, triggered: np.ndarray, num_classes: int, target: int) -> Evaluation:
    """Turn summed counts into rates.

    Args:
        clean: what `count` gives for the test set, summed over ranks.
        triggered: the same for the triggered examples; all zero if there are none.
        num_classes: C.
        target: the class that triggered examples are to be taken for.
    """
    confusion = clean[:-1].reshape(num_classes, num_classes)
    right = confusion.diagonal()
    occurring = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = 2 * right / np.maximum(occurring, 1)
    hits = triggered[:-1].reshape(num_classes, num_classes)
    loss = float(clean[-1] / confusion.sum())
    return Evaluation(
        accuracy=float(right.sum() / confusion.sum()),
        macro_f1=float(f1.mean()),
        loss=loss if math.isfinite(loss) else None,
        attack_success_rate=float(hits[:, target].sum() / hits.sum()) if hits.sum() else None,
    )
