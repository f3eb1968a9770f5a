"""Canaries: clients whose updates are known, put through the run's own mechanism, to bound its epsilon from below.

dp_fedavg: the clients of a federation are canaries, each with an update along a coordinate of its own, longer than the
clipping norm; as many others never take part. After all rounds the scores are the numbers of the global vector, which
is what the public sees: clients also see the step of each round, and the server who takes part. Cohorts, clipping,
units, sum and noise are those of `Server` and `draw_cohort`, without masks. The guarantee does not depend on the number
of clients, nor on P.

ldp: two inputs that are as far apart as the stated bound allows (each local step moves by the whole clipping norm,
along a vector of signs), through the noise of each round; the scores are log-likelihood ratios.

Legend: m canaries, half of them in, P parameters.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.audit.epsilon import lower_bound
from fedprompt_mpi.audit.record import CanaryRecord
from fedprompt_mpi.comm.codec import FLOAT32
from fedprompt_mpi.comm.local_channel import LocalChannel
from fedprompt_mpi.config import CommConfig, FederationConfig, RunConfig
from fedprompt_mpi.federation.client_training import learning_rate
from fedprompt_mpi.federation.cohort import draw_cohort
from fedprompt_mpi.federation.privacy import add_laplace, central_epsilon, ldp_epsilon
from fedprompt_mpi.federation.server import Server
from fedprompt_mpi.federation.updates import HEADER, LocalUpdates, gather

TIMES_THE_BOUND = 30.0
"""Length of a canary's update, which the mechanism must clip."""


def audit_mechanism(config: RunConfig, parameters: int, alive: Callable[[], None] = lambda: None) -> CanaryRecord:
    """Return what canaries say of the mechanism of a run, beside what its accountant says.

    Args:
        config: of the run.
        parameters: P.
        alive: called now and then.
    """
    rounds, count = config.federation.rounds, config.privacy.canaries // 2
    if config.privacy.mechanism == "dp_fedavg":
        inside, outside = _central_scores(config, count, alive)
        stated, delta = central_epsilon(config, rounds).epsilon, config.privacy.delta
    else:
        inside, outside = _local_scores(config, parameters, count, alive)
        stated, delta = ldp_epsilon(config, parameters, sum(_rates(config))), 0.0
    found = lower_bound(inside, outside, delta)
    return CanaryRecord(
        mechanism=config.privacy.mechanism,
        rounds=rounds,
        inside=count,
        outside=count,
        bound=found.bound,
        estimate=found.estimate if math.isfinite(found.estimate) else None,
        most=found.most,
        stated=stated,
        delta=delta,
    )


def _central_scores(config: RunConfig, count: int, alive: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of canaries that take part and of those that do not, each `[count]` float64."""
    federation = FederationConfig(clients=count, rounds=config.federation.rounds, fraction=config.federation.fraction)
    privacy = dataclasses.replace(config.privacy, secure_aggregation=False, threshold=None, neighbours=None, audit=[])
    own = RunConfig(seed=config.seed, federation=federation, privacy=privacy, comm=CommConfig())
    server, channel = Server(np.zeros(2 * count, dtype=np.float32), own, is_root=True), LocalChannel()
    length = TIMES_THE_BOUND * config.privacy.clip_norm
    for round_ in range(1, federation.rounds + 1):
        cohort = draw_cohort(own, 1, round_)
        deltas = np.zeros((len(cohort.clients), 2 * count), dtype=np.float32)
        deltas[np.arange(len(deltas)), list(cohort.clients)] = length
        headers = np.zeros(len(deltas), dtype=HEADER)
        headers["client"], headers["num_examples"], headers["norm"] = cohort.clients, 1, length
        updates = LocalUpdates(cohort=cohort, headers=headers, deltas=deltas, own_rates=[])
        alive()
        server.apply(gather(channel, updates, FLOAT32, server.judge), channel.phases, round_)
    return server.vector[:count].astype(np.float64), server.vector[count:].astype(np.float64)


def _local_scores(config: RunConfig, size: int, count: int, alive: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """Return log-likelihood ratios of uploads of the one input and of the other, each `[count]` float64."""
    clip_norm, scale = config.client.clip_norm, config.privacy.laplace_scale
    assert clip_norm is not None
    scores = np.zeros((2, count))
    for trial in range(count):
        rng = seeds.generator(config.seed, "canaries", 0, trial)
        signs = rng.choice(np.array([-1, 1], dtype=np.float32), size)
        alive()
        for rate in _rates(config):
            move = np.float32(clip_norm * rate / math.sqrt(size)) * signs
            for which, sign in enumerate((1, -1)):
                upload = sign * move
                add_laplace(upload, scale, rng)
                scores[which, trial] += float((np.abs(upload + move) - np.abs(upload - move)).sum(dtype=np.float64))
    return scores[0] / scale, scores[1] / scale


def _rates(config: RunConfig) -> list[float]:
    """Return the sum of the learning rates of each round."""
    steps, rounds = config.client.steps, config.federation.rounds
    return [
        sum(learning_rate(config.client, rounds, done + step / steps) for step in range(steps))
        for done in range(rounds)
    ]
