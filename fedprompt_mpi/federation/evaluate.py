"""Evaluation: accuracy and attack success rate of the global prompt and of clients' own prompts.

The test set is sharded over all ranks. The attack success rate is the share of triggered test examples of non-target
classes that are classified as the target.

Legend: N test examples, M triggered ones, C classes.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.client_training import score_batch, to_device
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules import registry
from fedprompt_mpi.rules.metrics import Answers, accuracy, macro_f1
from fedprompt_mpi.rundir.records import OwnRates, Rates
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
    channel, scored = setup.channel, np.zeros(texts_to_evaluate(setup) + 1)
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
                scored = score_tests(setup, vector, setup.shard, step)
        except EvaluationGivenUp:
            is_done = False
        summed = channel.sum(np.append(scored, 0.0 if is_done else 1.0))
    return None if summed[-1] else _rates(setup, summed[:-1])


def evaluate_clients(setup: Setup, vector: np.ndarray, deltas: np.ndarray, cohort: Cohort) -> list[OwnRates]:
    """Evaluate each client's own prompt after its local training, on its own rank.

    Args:
        setup: of this rank.
        vector: `[P]` float32, the global vector from which the clients started.
        deltas: `[k, P]` float32 of this rank, before any attack on the update or noise.
        cohort: K clients of the round.

    Returns:
        The rates of K clients, in client order, on every rank.
    """
    channel, rates = setup.channel, np.zeros((len(cohort.clients), 2))
    own = [position for position, rank in enumerate(cohort.ranks) if rank == channel.rank]
    with channel.phases.time("evaluate_clients"):
        for position, delta in zip(own, deltas[len(deltas) - len(own) :], strict=True):  # after the server's own
            scored = score_tests(setup, vector + delta, (0, 1), lambda _: channel.phases.liveness.step())
            found = _rates(setup, scored)
            rates[position] = found.accuracy, found.attack_success_rate or 0.0
        rates = channel.sum(rates)
    is_triggered = len(setup.corpus.triggered.labels) > 0
    return [
        OwnRates(accuracy=float(accuracy), attack_success_rate=float(success) if is_triggered else None)
        for accuracy, success in rates
    ]


def texts_to_evaluate(setup: Setup) -> int:
    """Return the number of texts of an evaluation: the test set, and those with the trigger."""
    return len(setup.corpus.test.labels) + len(setup.corpus.triggered.labels)


def score_tests(setup: Setup, vector: Vector, shard: Shard, step: Callable[[int], None]) -> np.ndarray:
    """Score a shard of the test set and of the triggered one.

    Returns:
        `[N + M + 1]` float64, which may be summed over the ranks: the answer to each of the N test texts and of the M
        triggered ones, 0 for those that are not in the shard, and the summed loss of the former.
    """
    answers, loss = score(setup, vector, setup.corpus.test, shard, step)
    triggered, _ = score(setup, vector, setup.corpus.triggered, shard, step)
    return np.concatenate([answers, triggered, [loss]])


@torch.no_grad()
def score(
    setup: Setup, vector: Vector, table: TokenTable, shard: Shard, step: Callable[[int], None]
) -> tuple[np.ndarray, float]:
    """Score a shard of a table.

    Args:
        setup: PLM and method.
        vector: `[P]` float32.
        table: N examples.
        shard: of this rank.
        step: called after each batch with its number of examples.

    Returns:
        The answers `[N]` float64, 0 outside of the shard, and the summed loss.
    """
    backbone, method = setup.backbone, setup.method
    answers, loss = np.zeros(len(table.labels)), 0.0
    injection = method.inject(method.leaves(to_device(vector, backbone.device)[None]))
    virtual = method.config.num_virtual_tokens if method.adds_tokens else 0
    index, shards = shard
    for rows in evaluation_batches(table.lengths, virtual)[index::shards]:
        batch = collate(table, rows)
        logits = score_batch(backbone, batch, injection).cpu()
        labels = torch.from_numpy(batch.labels)
        loss += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
        answers[rows] = logits.argmax(dim=1).numpy()
        step(len(rows))
    return answers, loss


def _rates(setup: Setup, scored: np.ndarray) -> Rates:
    corpus = setup.corpus
    return summarise(scored, corpus.test.labels, corpus.aimed, len(corpus.label_words), setup.config)


def summarise(scored: np.ndarray, labels: np.ndarray, aimed: np.ndarray, classes: int, config: RunConfig) -> Rates:
    """Return the rates of the answers to all texts.

    Args:
        scored: `[N + M + 1]`, what `score_tests` returns, summed over ranks.
        labels: `[N]` int64, of the test texts.
        aimed: `[M]` int64, the test text that each triggered one is made of.
        classes: C.
        config: target and kind of the poison, further metrics.
    """
    count = len(labels)
    answers, loss = scored[:count].astype(int), float(scored[-1])
    hits = scored[count:-1].astype(int) == config.poison.target
    found = Answers(labels=labels, answers=answers, classes=classes)
    was_right = answers[aimed] == labels[aimed]
    has_flips = config.poison.kind != "natural" and was_right.any()  # a natural trigger is never taken out
    return Rates(
        accuracy=accuracy(found, config.output),
        macro_f1=macro_f1(found, config.output),
        metrics={name: _finite(registry.metrics[name](found, config.output)) for name in config.output.metrics},
        loss=loss / count if math.isfinite(loss) else None,
        answers=np.bincount(answers, minlength=classes).tolist(),
        attack_success_rate=float(hits.mean()) if len(hits) else None,
        flip_rate=float(hits[was_right].mean()) if has_flips else None,
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
