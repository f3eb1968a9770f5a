"""Shadow clients: uploads that whoever attacks an upload makes itself, of texts that no client has.

They are trained from the same vector as the clients, with the same settings, on texts of the evaluation split. From
them an attack learns what an upload looks like without an example, and what labels do to it.

Legend: S shadow clients, P parameters, C classes, K clients of a sum.
"""

import contextlib
import dataclasses

import numpy as np

from fedprompt_mpi import seeds
from fedprompt_mpi.comm.device import Vector
from fedprompt_mpi.federation.client_training import Job, to_host, train
from fedprompt_mpi.federation.privacy import add_laplace
from fedprompt_mpi.federation.rank_training import clients_per_pass, make_trainer
from fedprompt_mpi.federation.server import make_rule
from fedprompt_mpi.federation.setup import Setup
from fedprompt_mpi.rules.aggregator_base import clip_factors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shadows:
    """The uploads of shadow clients, or sums of them."""

    deltas: np.ndarray
    """`[S, P]` float32."""
    shares: np.ndarray
    """`[S, C]` float64: the share of each class in what they were trained on."""


def train_shadows(setup: Setup, vector: Vector, rows: np.ndarray, steps: int, round_: int) -> Shadows:
    """Train shadow clients of a round from its vector `[P]`, each for some steps.

    Each has class shares of its own, drawn uniformly, so that many mixtures are there.

    Args:
        setup: of this rank.
        vector: of the broadcast.
        rows: of the evaluation split, from which the texts are drawn.
        steps: of a client.
        round_: from 1.
    """
    config, table = setup.config, setup.corpus.test
    count, size = config.privacy.shadow_clients, config.client.batch_size
    classes, labels = len(setup.corpus.label_words), table.labels[rows]
    there = np.unique(labels)
    jobs, shares = [], np.zeros((count, classes))
    for shadow in range(count):
        rng = seeds.generator(config.seed, "shadow clients", round_, shadow)
        mixture = rng.dirichlet(np.ones(len(there)))
        drawn = rng.choice(there, steps * size, p=mixture)
        chosen = np.array([rng.choice(rows[labels == label]) for label in drawn])
        shares[shadow] = np.bincount(drawn, minlength=classes) / len(drawn)
        jobs.append(Job(client=shadow, steps=list(chosen.reshape(steps, size))))
    trainer, at_once = make_trainer(setup, table), clients_per_pass(setup)
    stream = int(seeds.generator(config.seed, "dropout of shadows", round_).integers(2**63))
    dropping = setup.backbone.dropping_out(stream) if config.drops_out else contextlib.nullcontext()
    deltas = np.empty((count, setup.method.layout.size), dtype=np.float32)
    liveness = setup.channel.phases.liveness
    with dropping:
        for at in range(0, count, at_once):
            update = train(trainer, vector, jobs[at : at + at_once], round_, lambda step: liveness.step())
            made = update.deltas if isinstance(update.deltas, np.ndarray) else to_host(update.deltas)
            deltas[at : at + at_once] = made
    if config.privacy.mechanism == "ldp":
        for shadow, delta in enumerate(deltas):
            rng = seeds.generator(config.seed, "shadow noise", round_, shadow)
            add_laplace(delta, config.privacy.laplace_scale, rng)
    return Shadows(deltas=deltas, shares=shares)


def sums_of(setup: Setup, shadows: Shadows, clients: int, round_: int, *, with_noise: bool) -> Shadows:
    """Return as many sums of K shadow clients, drawn with replacement, scaled to the bound, as there are shadows.

    Rules that leave updates out, weights and the server's optimiser are not imitated.
    """
    config, rule = setup.config, make_rule(setup.config)
    noise_std = float(np.hypot(rule.noise_std, config.federation.noise_std)) if with_noise else 0.0
    norms = np.linalg.norm(shadows.deltas.astype(np.float64), axis=1)
    factors = np.ones(len(norms)) if rule.bound is None else clip_factors(norms, rule.bound)
    share = (
        1 / clients
        if config.privacy.mechanism != "dp_fedavg"
        else 1 / (config.federation.fraction * config.federation.clients)
    )
    deltas, shares = np.zeros_like(shadows.deltas), np.zeros_like(shadows.shares)
    for place in range(len(deltas)):
        rng = seeds.generator(config.seed, "sums of shadows", round_, place)
        for chosen in rng.integers(len(deltas), size=clients):
            deltas[place] += np.float32(share * factors[chosen]) * shadows.deltas[chosen]
            shares[place] += shadows.shares[chosen] / clients
        if noise_std:
            deltas[place] += rng.normal(0.0, noise_std, deltas.shape[1]).astype(np.float32)
    return Shadows(deltas=deltas, shares=shares)
