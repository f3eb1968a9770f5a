"""What one rank does in a round: train its clients of the cohort, as many in a pass as asked for."""

from typing import Any

import numpy as np
import torch

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.channel import HEADER, Channel
from fedprompt_mpi.comm.last_seen import HERE
from fedprompt_mpi.comm.stop import is_requested
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.attack import ATTACKS, Attack, Observer, attacking_clients
from fedprompt_mpi.federation.client import Job, train
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.feedback import ClientFeedback
from fedprompt_mpi.federation.privacy import add_laplace
from fedprompt_mpi.federation.room import room_for
from fedprompt_mpi.federation.rule import euclidean_norm
from fedprompt_mpi.plm.backbone import Backbone
from fedprompt_mpi.plm.methods import Method
from fedprompt_mpi.text.batches import collate, local_steps
from fedprompt_mpi.text.corpus import Corpus

MOST_TOKENS_IN_A_PASS = 16384
"""How many padded tokens the clients of one pass may bring together, when client.batched is auto."""


class _GivenUp(Exception):  # noqa: N818 - nothing went wrong
    """Local training was broken off, since this process has been asked to stop."""


def make_attacks(config: RunConfig, cohort: Cohort, rank: int, observer: Observer) -> dict[int, Attack]:
    """Return what each of a rank's clients that attack their update is up to in this round."""
    attacking = attacking_clients(config)
    attackers = [client for client in cohort.of_rank(rank) if client in attacking]
    if not attackers:
        return {}
    return dict.fromkeys(attackers, ATTACKS[config.poison.attack](config.poison, observer.last_update))


def make_jobs(
    config: RunConfig, corpus: Corpus, cohort: Cohort, rank: int, round_: int, attacks: dict[int, Attack]
) -> list[Job]:
    """Choose the examples of every step of each of a rank's clients, and the bounds that attackers keep to."""
    jobs = []
    for client in cohort.trainers(rank):
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
        bounded = client in attacks and attacks[client].bounds_training
        constrain = attacks[client].constrain if bounded else None
        jobs.append(Job(client=client, steps=[rows[chosen] for chosen in steps], constrain=constrain))
    return jobs


def clients_per_pass(config: RunConfig, method: Method) -> int:
    """Return how many clients go through the PLM together: as told, or as many as fit."""
    if not method.shares_passes:
        return 1
    if config.client.batched != "auto":
        return config.client.batched
    virtual = config.prompt.num_virtual_tokens if method.adds_tokens else 0
    return max(1, MOST_TOKENS_IN_A_PASS // (config.client.batch_size * (config.model.max_length + virtual)))


def steps_by_rank(config: RunConfig, corpus: Corpus, method: Method, cohort: Cohort) -> np.ndarray:
    """Return how many steps each rank takes in a round `[R]` int64, for a progress bar."""
    settings, size = config.client, clients_per_pass(config, method)
    taken = np.zeros(cohort.size, dtype=np.int64)
    for rank in range(cohort.size):
        counts = [corpus.num_examples(client) for client in cohort.trainers(rank)]
        steps = [
            settings.steps if settings.epochs is None else settings.epochs * -(-n // min(n, settings.batch_size))
            for n in counts
        ]
        taken[rank] = sum(max(steps[at : at + size]) for at in range(0, len(steps), size))
    return taken


def train_rank(
    config: RunConfig,
    corpus: Corpus,
    backbone: Backbone,
    method: Method,
    vector: Any,
    jobs: list[Job],
    round_: int,
    channel: Channel,
    *,
    may_give_up: bool,
) -> tuple[np.ndarray, Any]:
    """Train this rank's clients from the global vector.

    Args:
        config: of the run.
        corpus: the training table.
        backbone: the PLM.
        method: what vectors mean.
        vector: `[P]` float32, the global one.
        jobs: this rank's clients.
        round_: from 1.
        channel: told of every step.
        may_give_up: whether to break off if this process has been asked to stop; the headers say so then.

    Returns:
        Headers `[k]` of dtype `HEADER`, whose norms are yet to come, and deltas `[k, P]` float32, in client order; they
        are an array or a tensor on the device, as the vector is.
    """
    HERE.enter("train", round_)
    start = channel.timing.clock()
    headers = np.zeros(len(jobs), dtype=HEADER)
    shape, copy_s = (len(jobs), method.layout.size), 0.0
    deltas: Any = room_for(*shape) if isinstance(vector, np.ndarray) else vector.new_empty(shape)
    size = clients_per_pass(config, method)
    passes = [jobs[at : at + size] for at in range(0, len(jobs), size)]
    left = sum(max(len(job.steps) for job in some) for some in passes)

    def report(step: int) -> None:
        channel.report_progress(left - step)
        if may_give_up and is_requested():
            raise _GivenUp

    headers["client"] = [job.client for job in jobs]
    headers["num_examples"] = [corpus.num_examples(job.client) for job in jobs]
    for first, some in zip(range(0, len(jobs), size), passes, strict=True):
        try:
            update = train(
                backbone,
                method,
                config.client,
                vector,
                some,
                lambda rows: collate(corpus.train, rows),
                round_=round_,
                rounds=config.federation.rounds,
                report=report,
            )
        except _GivenUp:
            headers["given_up"] = True
            break
        left -= max(len(job.steps) for job in some)
        copy_s += update.copy_s
        deltas[first : first + size] = update.deltas
        headers["loss"][first : first + size] = update.losses
        headers["train_s"][first : first + size] = update.seconds / len(some)
    channel.timing.add("train", channel.timing.clock() - start - copy_s)
    if copy_s:
        channel.timing.add("copy", copy_s)
    return headers, deltas


def finish_updates(
    config: RunConfig,
    headers: np.ndarray,
    deltas: Any,
    attacks: dict[int, Attack],
    feedback: ClientFeedback,
    round_: int,
) -> None:
    """Turn what was trained into what is sent, in place: attacked, or noised for privacy; then take the norms.

    Whatever it is, it goes through the wire's format, and what that loses is fed back. Updates that stay on a device
    are sent as they are: the settings see to that.

    A client that attacks its update adds no noise of its own to it: nobody can make it.
    """
    if not isinstance(deltas, np.ndarray):
        if len(deltas):
            headers["norm"] = torch.linalg.vector_norm(deltas, dim=1, dtype=torch.float64).cpu()
        return
    clients = config.federation.clients
    for header, delta in zip(headers, deltas, strict=True):
        client = int(header["client"])
        if client in attacks:
            delta[:] = attacks[client].send(delta, seeds.generator(config.seed, "attack", round_, client))
        elif config.privacy.mechanism == "ldp" and client < clients:  # the server's own update stays with it
            add_laplace(delta, config.privacy.laplace_scale, seeds.generator(config.seed, "ldp", round_, client))
        feedback.send(client, delta)
        header["norm"], header["largest"] = euclidean_norm(delta), np.abs(delta).max()
