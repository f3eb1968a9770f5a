"""One whole run: the paper's Algorithm 1 (Zhao et al., FedPrompt, 2022, arXiv:2208.12268).

Every rank runs this same sequence; what only rank 0 does (aggregate, keep records, speak) sends nothing.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from fedprompt_mpi.comm.channel import Channel, open_channel
from fedprompt_mpi.comm.launcher import read_launch
from fedprompt_mpi.config import RunConfig, SettingsError
from fedprompt_mpi.federation.aggregate import AGGREGATORS
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.server import Server
from fedprompt_mpi.journal import Journal
from fedprompt_mpi.prepare import Prepared, prepare
from fedprompt_mpi.text.tasks import Task, resolve


def run(config: RunConfig | None = None) -> dict[str, Any]:
    """Train a prompt by federated learning on all ranks of this job; without mpirun, in this process.

    Args:
        config: the settings, the same on every rank; the defaults train the embedded model.

    Returns:
        What summary.json holds, on rank 0; {} on the others.

    Raises:
        SettingsError: on every rank, if settings or data are wrong.
    """
    started = time.perf_counter()
    config = config or RunConfig()
    task = resolve(config.task)
    launch = read_launch()
    check_ranks(config, launch.size)
    channel = open_channel(launch, measure=config.comm.mode == "measure")
    try:
        result = federate(config, task, channel, prepare(config, task, channel), started)
    except SettingsError:  # raised on all ranks alike
        channel.close()
        raise
    except BaseException:  # on this rank perhaps: nobody may wait for the others now
        channel.abandon()
        raise
    channel.close()
    return result


def check_ranks(config: RunConfig, size: int) -> None:
    """Raise SettingsError if some of `size` ranks would have no client."""
    clients = config.federation.clients
    if size > clients + 1:
        idle = f"rank {size - 1}" if size == clients + 2 else f"ranks {clients + 1} to {size - 1}"
        raise SettingsError(
            f"federation.clients is {clients} but there are {size} ranks, of which {idle} would stay idle: "
            f"start at most {clients + 1} (rank 0 and one for each client), or have more clients"
        )


def check_finite(headers: np.ndarray, round_: int, lr: float) -> None:
    """Raise SettingsError, on every rank alike, if a client's training has diverged."""
    diverged = headers["client"][~(np.isfinite(headers["loss"]) & np.isfinite(headers["norm"]))]
    if len(diverged):
        raise SettingsError(
            f"client.lr is {lr}, with which client {diverged[0]} diverged in round {round_} (its loss or its update is "
            "not finite): take a smaller one"
        )


def federate(config: RunConfig, task: Task, channel: Channel, ready: Prepared, started: float) -> dict[str, Any]:
    """Go through the rounds.

    Round t sends the vector that round t - 1 made, and evaluates it on arrival, so that evaluation costs no
    broadcast of its own; a last broadcast brings the final vector.
    """
    from fedprompt_mpi.federation.local import make_jobs, steps_by_rank, train_rank

    rounds = config.federation.rounds
    first = ready.checkpoint.round_ + 1
    server = Server(ready.checkpoint.vector, AGGREGATORS[config.federation.aggregator]())
    journal = Journal(config, task, channel, ready)
    timing = channel.timing
    try:
        for round_ in range(first, max(rounds, first - 1) + 2):
            clock = time.perf_counter()
            cohort = draw_cohort(
                config.federation.clients, config.federation.fraction, channel.size, config.seed, round_
            )
            jobs = make_jobs(config, ready.corpus, cohort, channel.rank, round_) if round_ <= rounds else []
            timing.round_ = round_
            steps = steps_by_rank(config, ready.corpus, ready.method, cohort)
            channel.watch_progress(journal.console.start_steps(int(steps.max())), steps)
            channel.broadcast(server.vector, ready.method.layout.fingerprint)
            journal.arrived(time.perf_counter() - started)

            timing.round_ = round_ - 1  # what has arrived is the work of the round before
            journal.finish_round(_evaluate(config, task, channel, ready, server.vector, round_ - 1))
            if round_ > rounds:
                break
            timing.round_ = round_
            with timing.phase("train"):
                headers, deltas = train_rank(
                    config, ready.corpus, ready.backbone, ready.method, server.vector, jobs, round_, channel
                )
            gathered = channel.gather(headers, deltas, cohort.counts)
            check_finite(gathered.headers, round_, config.client.lr)
            server.apply(gathered, timing, is_root=channel.rank == 0)
            journal.trained(round_, cohort, gathered, server.vector, time.perf_counter() - clock)
        return journal.close(server.vector, time.perf_counter() - started)
    finally:
        journal.console.close()


def _evaluate(
    config: RunConfig, task: Task, channel: Channel, ready: Prepared, vector: np.ndarray, round_: int
) -> dict[str, Any]:
    """Evaluate the vector that a round made, if it is the round for it; every rank returns the same rates."""
    from fedprompt_mpi.federation.evaluate import count, summarise

    if round_ % config.output.evaluate_every and round_ < config.federation.rounds:
        return {}
    classes = len(task.label_words)
    counts = np.zeros((2, classes * classes + 1))
    with channel.timing.phase("evaluate"):  # until the slowest rank is done
        if ready.shard is not None:
            for row, table in enumerate((ready.corpus.test, ready.corpus.triggered)):
                counts[row] = count(ready.backbone, ready.method, vector, table, classes, ready.shard)
        clean, triggered = channel.sum(counts)
    return dataclasses.asdict(summarise(clean, triggered, classes, config.poison.target))
