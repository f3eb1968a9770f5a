"""What one rank does in a round: train its clients of the cohort, as many in a pass as asked for."""

import numpy as np

from fedprompt_mpi.comm.channel import HEADER, Channel
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.client import Job, train
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.plm.backbone import Backbone
from fedprompt_mpi.plm.methods import Method
from fedprompt_mpi.text.batches import collate, local_steps
from fedprompt_mpi.text.corpus import Corpus

MOST_TOKENS_IN_A_PASS = 16384
"""How many padded tokens the clients of one pass may bring together, when client.batched is auto."""


def make_jobs(config: RunConfig, corpus: Corpus, cohort: Cohort, rank: int, round_: int) -> list[Job]:
    """Choose the examples of every step of each of a rank's clients."""
    jobs = []
    for client in cohort.of_rank(rank):
        rows = corpus.client_rows(client)
        steps = local_steps(
            corpus.train.lengths[rows],
            seed=config.seed,
            round_=round_,
            client=client,
            batch_size=config.client.batch_size,
            steps=config.client.steps,
            epochs=config.client.epochs,
        )
        jobs.append(Job(client=client, steps=[rows[chosen] for chosen in steps]))
    return jobs


def clients_per_pass(config: RunConfig, method: Method) -> int:
    """Return how many clients go through the PLM together: as told, or as many as fit."""
    if not method.shares_passes:
        return 1
    if config.client.batched != "auto":
        return config.client.batched
    virtual = config.prompt.num_virtual_tokens if method.adds_tokens else 0
    return max(1, MOST_TOKENS_IN_A_PASS // (config.client.batch_size * (config.model.max_length + virtual)))


def steps_of_slowest_rank(config: RunConfig, corpus: Corpus, method: Method, cohort: Cohort) -> int:
    """Return how many steps the rank with the most to do takes, for a progress bar."""
    settings, size = config.client, clients_per_pass(config, method)
    most = 0
    for rank in set(cohort.ranks):
        counts = [corpus.num_examples(client) for client in cohort.of_rank(rank)]
        steps = [
            settings.steps if settings.epochs is None else settings.epochs * -(-n // min(n, settings.batch_size))
            for n in counts
        ]
        most = max(most, sum(max(steps[at : at + size]) for at in range(0, len(steps), size)))
    return most


def train_rank(
    config: RunConfig,
    corpus: Corpus,
    backbone: Backbone,
    method: Method,
    vector: np.ndarray,
    jobs: list[Job],
    round_: int,
    channel: Channel,
) -> tuple[np.ndarray, np.ndarray]:
    """Train this rank's clients from the global vector.

    Returns:
        Headers `[k]` of dtype `HEADER` and deltas `[k, P]` float32, in client order.
    """
    headers = np.zeros(len(jobs), dtype=HEADER)
    deltas = np.empty((len(jobs), method.layout.size), dtype=np.float32)
    size = clients_per_pass(config, method)
    done = 0
    for first in range(0, len(jobs), size):
        some = jobs[first : first + size]
        update = train(
            backbone,
            method,
            config.client,
            vector,
            some,
            lambda rows: collate(corpus.train, rows),
            round_=round_,
            rounds=config.federation.rounds,
            report=lambda step, done=done: channel.report_progress(done + step),
        )
        done += max(len(job.steps) for job in some)
        deltas[first : first + size] = update.deltas
        headers["loss"][first : first + size] = update.losses
        headers["train_s"][first : first + size] = update.seconds / len(some)
    headers["client"] = [job.client for job in jobs]
    headers["num_examples"] = [corpus.num_examples(job.client) for job in jobs]
    headers["norm"] = [np.sqrt(np.einsum("i,i", delta, delta, dtype=np.float64)) for delta in deltas]
    return headers, deltas
