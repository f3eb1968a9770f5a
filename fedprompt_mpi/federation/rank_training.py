"""Local training of one rank: it trains its clients of the cohort, several in one pass."""

import contextlib

import numpy as np
import torch

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.device import Vector, is_on_host
from fedprompt_mpi.config import RunConfig
from fedprompt_mpi.federation.client_training import Job, Trainer, train
from fedprompt_mpi.federation.cohort import Cohort
from fedprompt_mpi.federation.feedback import ClientFeedback
from fedprompt_mpi.federation.privacy import add_laplace
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.federation.updates import HEADER, LocalUpdates
from fedprompt_mpi.plm.method_base import Method
from fedprompt_mpi.rules.aggregator_base import euclidean_norm
from fedprompt_mpi.rules.attack_base import Attack
from fedprompt_mpi.rules.spill import zeros
from fedprompt_mpi.text.batches import Own, collate, local_steps
from fedprompt_mpi.text.tokens import TokenTable

MOST_TOKENS_IN_A_PASS = 16384
"""Most padded tokens of the clients of one pass, when client.batched is auto."""


class TrainingGivenUp(Exception):  # noqa: N818 - nothing went wrong
    """This process was asked to stop, and gives the round's local training up."""


def make_jobs(setup: Setup, cohort: Cohort, round_: int, attacks: dict[int, Attack]) -> list[Job]:
    """Choose the examples of every step of each of this rank's clients, and the constraints of attackers."""
    jobs = []
    for client in cohort.trainers(setup.channel.rank):
        bounded = client in attacks and attacks[client].bounds_training
        constrain = attacks[client].constrain if bounded else None
        jobs.append(Job(client=client, steps=steps_of(setup, client, round_), constrain=constrain))
    return jobs


def steps_of(setup: Setup, client: int, round_: int) -> list[np.ndarray]:
    """Return the rows of the training table that a client trains on in each step of a round."""
    corpus = setup.corpus
    rows = corpus.client_rows(client)
    own = Own(lengths=corpus.train.lengths[rows], labels=corpus.train.labels[rows])
    return [rows[chosen] for chosen in local_steps(own, setup.config.client, setup.config.seed, round_, client)]


def clients_per_pass(setup: Setup) -> int:
    """Return how many clients go through the PLM in one pass: the setting's number, or as many as fit."""
    config, method = setup.config, setup.method
    if not method.shares_passes:
        return 1
    if config.client.batched != "auto":
        return config.client.batched
    virtual = config.prompt.num_virtual_tokens if method.adds_tokens else 0
    return max(1, MOST_TOKENS_IN_A_PASS // (config.client.batch_size * (config.model.max_length + virtual)))


def steps_by_rank(setup: Setup, cohort: Cohort) -> np.ndarray:
    """Return the number of steps of each rank in a round `[R]` int64, for a progress bar."""
    settings, size = setup.config.client, clients_per_pass(setup)
    clients, ranks = list(cohort.clients), list(cohort.ranks)
    if cohort.server is not None:  # it trains on rank 0, before that rank's clients
        clients.insert(0, cohort.server)
        ranks.insert(0, 0)
    steps = np.full(len(clients), settings.steps, dtype=np.int64)
    if settings.epochs is not None:
        counts = np.array([setup.corpus.num_examples(client) for client in clients], dtype=np.int64)
        steps = settings.epochs * -(-counts // np.minimum(counts, settings.batch_size))
    taken = np.zeros(cohort.size, dtype=np.int64)
    if clients:
        homes = np.array(ranks)
        place = np.arange(len(homes)) - np.searchsorted(homes, homes)  # of a client on its rank
        passes = np.flatnonzero(place % size == 0)  # the first client of each pass
        np.add.at(taken, homes[passes], np.maximum.reduceat(steps, passes))
    return taken


def train_rank(
    setup: Setup, vector: Vector, jobs: list[Job], round_: int, *, may_give_up: bool
) -> tuple[np.ndarray, Vector]:
    """Train this rank's clients from the global vector.

    Args:
        setup: of this rank.
        vector: `[P]` float32, the global vector.
        jobs: this rank's clients.
        round_: from 1.
        may_give_up: True to give up if this process is asked to stop; then the headers say so.

    Returns:
        Headers `[k]` of dtype `HEADER` without norms, and deltas `[k, P]` float32, in client order. The deltas are an
        array, or a tensor on the device if the vector is one.
    """
    config, corpus, phases, liveness = setup.config, setup.corpus, setup.channel.phases, setup.channel.phases.liveness
    liveness.enter("train", round_)
    start = phases.timing.clock()
    headers, copy_s, size = np.zeros(len(jobs), dtype=HEADER), 0.0, clients_per_pass(setup)
    shape = (len(jobs), setup.method.layout.size)
    deltas = zeros(*shape) if is_on_host(vector) else vector.new_empty(shape)
    passes = [(slice(at, at + size), jobs[at : at + size]) for at in range(0, len(jobs), size)]
    left = sum(max(len(job.steps) for job in some) for _, some in passes)

    def report(step: int) -> None:
        liveness.step()
        setup.channel.progress.report(left - step)
        if may_give_up and liveness.stop.requested:
            raise TrainingGivenUp

    trainer = make_trainer(setup, corpus.train)
    headers["client"] = [job.client for job in jobs]
    headers["num_examples"] = claimed_examples(config, headers["client"], [corpus.num_examples(j.client) for j in jobs])
    for rows, some in passes:
        try:
            with _dropout(setup, round_, some[0].client):
                update = train(trainer, vector, some, round_, report)
        except TrainingGivenUp:
            headers["given_up"] = True
            break
        left -= max(len(job.steps) for job in some)
        copy_s += update.copy_s
        deltas[rows], headers["loss"][rows] = update.deltas, update.losses
        headers["train_s"][rows] = update.seconds / len(some)
        del update  # while the next pass trains it would be there twice
    phases.timing.add("train", phases.timing.clock() - start - copy_s)
    if copy_s:
        phases.timing.add("copy", copy_s)
    return headers, deltas


def make_trainer(setup: Setup, table: TokenTable, method: Method | None = None) -> Trainer:
    """Return the trainer of this rank's clients, on rows of a table, perhaps of another method."""
    return Trainer(
        backbone=setup.backbone,
        method=method or setup.method,
        config=setup.config.client,
        make_batch=lambda rows: collate(table, rows),
        rounds=setup.config.federation.rounds,
    )


def _dropout(setup: Setup, round_: int, client: int) -> contextlib.AbstractContextManager[None]:
    """Return the context of a pass: it drops out if the settings say so, by a stream of the pass's first client."""
    if not setup.config.drops_out:
        return contextlib.nullcontext()
    stream = seeds.generator(setup.config.seed, "dropout", round_, client)
    return setup.backbone.dropping_out(int(stream.integers(2**63)))


def claimed_examples(config: RunConfig, clients: np.ndarray, counts: list[int]) -> np.ndarray:
    """Return how many examples each of k clients says that it has `[k]` int64, of its `counts`."""
    claimed, factor = np.array(counts, dtype=np.int64), config.poison.claimed_examples
    if factor != 1:
        lies = np.isin(clients, config.malicious)
        claimed[lies] = np.maximum(1, np.rint(factor * claimed[lies]))
    return claimed


def finish_updates(
    config: RunConfig, updates: LocalUpdates, attacks: dict[int, Attack], feedback: ClientFeedback, round_: int
) -> None:
    """Turn trained deltas into the updates that are sent, in place: attack or noise, codec, norms.

    The codec rounds every update, and the error feedback keeps the rounding errors. Deltas on a device are sent
    unchanged: the settings rule out everything else. A client that attacks its update adds no privacy noise: the server
    cannot make it do so.
    """
    headers, deltas = updates.headers, updates.deltas
    if not is_on_host(deltas):
        if len(deltas):
            headers["norm"] = torch.linalg.vector_norm(deltas, dim=1, dtype=torch.float64).cpu()
        return
    clients = config.federation.clients
    for header, delta in zip(headers, deltas, strict=True):
        client = int(header["client"])
        if client in attacks:
            delta[:] = attacks[client].send(delta, seeds.generator(config.seed, "attack", round_, client))
        elif config.privacy.mechanism == "ldp" and client < clients:  # the server's own update is not uploaded
            add_laplace(delta, config.privacy.laplace_scale, seeds.generator(config.seed, "ldp", round_, client))
        feedback.send(client, delta)
        header["norm"], header["largest"] = euclidean_norm(delta), np.abs(delta).max()
