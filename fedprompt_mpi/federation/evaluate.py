"""Evaluation: accuracy and attack success rate of the global prompt and of clients' own prompts.

The test set is sharded over all ranks. The attack success rate is the share of triggered test examples of non-target
classes that are classified as the target.

Legend: N test examples, C classes.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import score_batch, to_device
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rundir.records import Rates
from fedprompt_mpi.text.batches import collate, evaluation_batches
from fedprompt_mpi.text.tokens import TokenTable

Shard = tuple[int, int]
"""(index, count): a rank takes every count-th batch, beginning with index."""


class EvaluationGivenUp(Exception):  # noqa: N818 - nothing went wrong
    """This process was asked to stop, and gives the evaluation up."""


def evaluate(setup: Setup, vector: Vector, round_: int, tell: Callable[[int], None] | None = None) -> Rates | None:
    """Evaluate the global vector `[P]` after a round, each rank on its shard of the test set.

    Args:
        setup: of this rank.
        vector: the global one.
        round_: for the timings.
        tell: called with the number of texts that the ranks have done, as far as this one can guess.

    Returns:
        The rates, the same on every rank; None on all of them if one gave the evaluation up.
    """
    classes, channel = len(setup.corpus.label_words), setup.channel
    counts = np.zeros((2, classes * classes + 1))
    liveness, is_done, done = channel.phases.liveness, True, 0

    def step(rows: int) -> None:
        nonlocal done
        liveness.step()
        if tell is not None and setup.shard is not None:
            done += rows * setup.shard[1]  # the others are about as far
            tell(min(done, texts_to_evaluate(setup)))
        if liveness.stop.requested:
            raise EvaluationGivenUp

    with channel.phases.time("evaluate", round_):  # until the slowest rank is done
        try:
            if setup.shard is not None:
                counts = _count_both(setup, vector, setup.shard, step)
        except EvaluationGivenUp:
            is_done = False
        *summed, given_up = channel.sum(np.append(counts.ravel(), 0.0 if is_done else 1.0))
    if given_up:
        return None
    clean, triggered = np.reshape(summed, counts.shape)
    return summarise(clean, triggered, classes, setup.config.poison.target)


def evaluate_clients(setup: Setup, vector: np.ndarray, deltas: np.ndarray, cohort: Cohort) -> list[Rates]:
    """Evaluate each client's own prompt after its local training, on its own rank.

    Args:
        setup: of this rank.
        vector: `[P]` float32, the global vector from which the clients started.
        deltas: `[k, P]` float32 of this rank, before any attack on the update or noise.
        cohort: K clients of the round.

    Returns:
        The rates of K clients, in client order, on every rank.
    """
    classes, channel = len(setup.corpus.label_words), setup.channel
    counts = np.zeros((len(cohort.clients), 2, classes * classes + 1))
    own = [position for position, rank in enumerate(cohort.ranks) if rank == channel.rank]
    with channel.phases.time("evaluate_clients"):
        for position, delta in zip(own, deltas[len(deltas) - len(own) :], strict=True):  # after the server's own
            counts[position] = _count_both(setup, vector + delta, (0, 1), lambda _: channel.phases.liveness.step())
        counts = channel.sum(counts)
    return [summarise(clean, triggered, classes, setup.config.poison.target) for clean, triggered in counts]


def texts_to_evaluate(setup: Setup) -> int:
    """Return the number of texts of an evaluation: the test set, and those with the trigger."""
    return len(setup.corpus.test.labels) + len(setup.corpus.triggered.labels)


def _count_both(setup: Setup, vector: Vector, shard: Shard, step: Callable[[int], None]) -> np.ndarray:
    """Count the answers to the clean (row 0) and the triggered test set (row 1)."""
    tables = (setup.corpus.test, setup.corpus.triggered)
    return np.stack([count(setup, vector, table, shard, step) for table in tables])


@torch.no_grad()
def count(setup: Setup, vector: Vector, table: TokenTable, shard: Shard, step: Callable[[int], None]) -> np.ndarray:
    """Score a shard of a table.

    Args:
        setup: PLM and method.
        vector: `[P]` float32.
        table: N examples.
        shard: of this rank.
        step: called after each batch with its number of examples.

    Returns:
        `[C * C + 1]` float64: the confusion matrix (row: label, column: answer) and the summed loss, which may be
        summed over the ranks.
    """
    backbone, method, classes = setup.backbone, setup.method, len(setup.corpus.label_words)
    confusion = np.zeros((classes, classes))
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
        step(len(rows))
    return np.append(confusion.ravel(), loss)


def summarise(clean: np.ndarray, triggered: np.ndarray, num_classes: int, target: int) -> Rates:
    """Return the rates of summed counts.

    Args:
        clean: what `count` returns for the test set, summed over ranks.
        triggered: the same for the triggered examples; all zero if there are none.
        num_classes: C.
        target: the class that triggered examples should be classified as.
    """
    confusion = clean[:-1].reshape(num_classes, num_classes)
    right = confusion.diagonal()
    seen = confusion.sum(axis=0) + confusion.sum(axis=1)
    f1 = 2 * right[seen > 0] / seen[seen > 0]  # a class without labels and answers has none
    hits = triggered[:-1].reshape(num_classes, num_classes)
    loss = float(clean[-1] / confusion.sum())
    return Rates(
        accuracy=float(right.sum() / confusion.sum()),
        macro_f1=float(f1.mean()),
        loss=loss if math.isfinite(loss) else None,
        answers=confusion.sum(axis=0).astype(int).tolist(),
        attack_success_rate=float(hits[:, target].sum() / hits.sum()) if hits.sum() else None,
    )
